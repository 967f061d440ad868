"""From files of preference pairs to packed rows of token ids.

`records` reads rows of any known format, `encode` turns them into token ids, `pack` plans which
pairs share a row, `pipeline` delivers the planned rows, and `doctor` says what the data is like.
"""
