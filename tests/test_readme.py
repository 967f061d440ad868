"""The README's code runs as it stands, and its links lead somewhere."""

import pathlib
import re
import shutil

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_python_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "sage_jax/assets/quickstart", tmp_path / "model")
    shutil.copy(tmp_path / "model/pairs.jsonl", tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    loss, score = names["output"].metrics["loss"], names["output"].pairs.score
    assert abs(float(loss) - np.log(2)) < 5e-5
    assert np.isfinite(score).all() and score.shape == names["rows"].pair_RS.shape
    assert capsys.readouterr().out.startswith("0.693")


def test_links_in_the_documents_lead_to_files():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
