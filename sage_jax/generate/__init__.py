"""Problems with known answers, sampled completions, checked pairs and accuracy."""
