"""The report: one complete file from whatever a run has written."""

import json
import re
from html import parser

import pytest

from sage_jax.report import charts, html, writers

TRL_NAMES = (
    "loss grad_norm learning_rate entropy mean_token_accuracy logits/chosen logits/rejected "
    "logps/chosen logps/rejected rewards/chosen rewards/rejected rewards/accuracies rewards/margins"
).split()


def rows(steps=6, evaluate=True, accuracy=0.4, **extra):
    found = []
    for step in range(steps):
        row = {
            "step": step,
            "pairs": 8 * step,
            "flops": 1e9 * step,
            "epoch": 0.1,
            "num_tokens": 9,
            "flops_training": 1e9 * step,
            "perf/seconds": 0.5 * step,
        }
        row |= dict.fromkeys(TRL_NAMES, 0.5 + 0.01 * step) | extra
        if evaluate:
            row |= {"eval_accuracy": accuracy + 0.01 * step, "eval_accuracy_low": 0.3,
                    "eval_accuracy_high": 0.6}  # fmt: skip
        found.append(row)
    return found


def write_run(directory, found):
    with writers.MetricsWriter(directory / "metrics.jsonl") as writer:
        for row in found:
            writer.write(row)


def parse(text):
    """Tags in order, after checking that all are closed; and the visible text."""

    class Reader(parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.tags, self.text = [], [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            self.tags.append((tag, dict(attributes)))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def titles(page):
    return [a["aria-label"] for tag, a in page.tags if tag == "svg"]


@pytest.fixture
def full(tmp_path):
    selection = {
        "selection/pool": 64, "selection/selected": 32, "selection/score_pool": 1.0,
        "selection/score_selected": 2.0, "curriculum/competence_0": 0.9,
        "curriculum/competence_1": 0.4, "curriculum/share_0": 0.5, "curriculum/share_1": 0.5,
        "perf/step_time": 0.1, "eval_accuracy_level_2": 0.5, "eval_accuracy_level_10": 0.1,
    }  # fmt: skip
    write_run(tmp_path, rows(**selection))
    (tmp_path / "uniform").mkdir()
    write_run(tmp_path / "uniform", rows(steps=9, accuracy=0.3, **selection))
    writers.write_json(tmp_path / "summary.json", {
        "accuracy_before": 0.381, "accuracy_after": 0.611, "accuracy_uniform": 0.524,
        "accuracy_after_interval": [0.57, 0.65], "pairs_trained": 7680, "steps": 240,
        "seconds": 143.0, "flops_scoring": 0.0, "flops_training": 7.2e12, "seconds_training": 90.5,
        "steps_uniform": 229, "pairs_trained_uniform": 7328, "flops_scoring_uniform": 0.0,
        "flops_training_uniform": 7.1e12, "seconds_training_uniform": 85.25,
        "warnings": ["Step 7: chosen < reference."], "warnings_uniform": ["Step 9: far."],
        "pairs_reference": 4, "flops_reference": 3e9, "seconds_reference": 0.25,
    })  # fmt: skip
    writers.write_json(
        tmp_path / "config.json",
        {"mode": "train", "model": {"path": "tiny"}, "selection": {"name": "sage"}},
    )
    writers.write_selection(tmp_path, 0, [{"pair": 98765432, "selected": True, "why": "all"}])
    writers.write_selection(tmp_path, 3, [
        {"pair": 5, "prompt": "1 < 2 & 3", "stratum": 1, "score": 0.25, "selected": True,
         "why": "score"},
        {"pair": 6, "prompt": "low", "score": None, "selected": False, "why": "rank"},
        {"pair": 7, "prompt": "flipped?", "score": 0.1, "selected": False, "why": "noise"},
    ])  # fmt: skip
    return tmp_path


def test_the_report_shows_results_charts_examples_and_settings(full):
    path = html.write(full)
    assert path == full / "report.html"
    page = parse(path.read_text())
    text = " ".join(page.text)
    words = "38.1% 61.1% 52.4% 7,680 7.2e+12 7.1e+12 90.5 85.2 229 flipped? "
    words = (words + "round_00003.jsonl").split()
    for word in [*words, "57.0% – 65.0%", "2 min 23 s", "alignment of tiny", "1 < 2 & 3"]:
        assert word in text
    assert "98765432" not in text  # of an earlier round
    expected = [f"Held-out accuracy against {x}" for x in
                ("optimizer steps", "pairs trained", "total compute", "device time")]  # fmt: skip
    assert titles(page)[:4] == expected
    assert "Step 7: chosen < reference." in text and "uniform DPO: Step 9: far." in text
    assert "took 3e+09 FLOPs and 0.2 s, for 4 pairs" in text
    assert {"Loss", "Score: selected against all", "Competence by stratum", "Seconds a step",
            "Accuracy by level"} <= set(titles(page))  # fmt: skip


def test_both_runs_are_in_the_same_accuracy_charts(full):
    figures = charts.accuracy({"SAGE": rows(), "uniform DPO": rows(steps=9)})
    for chart in figures.split("</figure>")[:-1]:
        assert chart.count("<polyline") == 2
        assert chart.count("<polygon") == 2
        assert "SAGE" in chart
        assert "uniform DPO" in chart


def test_the_file_needs_nothing_else(full):
    text = html.write(full).read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in text
    assert "<link" not in text
    assert "src=" not in text


def test_every_chart_but_accuracys_is_explained_in_words(full):
    page = html.write(full).read_text()
    after = page.partition("<h2>Training</h2>")[2]
    figures = re.findall(r"<figure>.*?</figure>", after)
    assert len(figures) > 10
    assert all("<figcaption>" in figure for figure in figures)


def test_strata_and_levels_are_named_and_in_order(full):
    texts = parse(html.write(full).read_text()).text
    assert texts.index("level 2") < texts.index("level 10")
    assert "stratum 0" in texts


def test_metrics_alone_make_a_report(tmp_path):
    write_run(tmp_path, rows(evaluate=False))
    page = parse(html.write(tmp_path).read_text())
    assert "Loss" in titles(page)
    assert "not finished" in " ".join(page.text)
    assert not any("accuracy against" in title for title in titles(page))


def test_metrics_that_nobody_foresaw_are_shown_under_their_name(tmp_path):
    write_run(tmp_path, [{"step": s, "mine/odd (x)": 1.0 * s} for s in range(3)])
    page = parse(html.write(tmp_path).read_text())
    assert titles(page) == ["mine/odd (x)"]


def test_rows_of_nulls_make_no_chart(tmp_path):
    write_run(tmp_path, [{"step": 0, "loss": float("nan"), "eval_accuracy": None}])
    assert titles(parse(html.write(tmp_path).read_text())) == []


def test_text_of_the_data_cannot_become_markup(tmp_path):
    write_run(tmp_path, rows())
    writers.write_selection(
        tmp_path, 0, [{"pair": 0, "prompt": "<script>alert(1)</script>", "selected": True}]
    )
    writers.write_json(tmp_path / "config.json", {"model": {"path": "</title><b>"}})
    text = html.write(tmp_path).read_text()
    parse(text)
    assert "<script" not in text
    assert "<b>" not in text


def test_conversations_are_readable(tmp_path):
    write_run(tmp_path, rows())
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    writers.write_selection(tmp_path, 0, [{"pair": 0, "prompt": turns, "selected": True}])
    assert "user: hello\nassistant: hi" in html.write(tmp_path).read_text()


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no rows to report"):
        html.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trl_names_all_have_an_explanation():
    for name in [*TRL_NAMES, "eval_loss", "eval_rewards/margins", "perf/tokens_per_second"]:
        assert any(re.fullmatch(chart.pattern, name) for chart in charts.CHARTS), name


def test_the_settings_are_there_in_full(full):
    text = " ".join(parse(html.write(full).read_text()).text)
    shown = json.loads(text[text.index('{\n  "mode"') : text.rindex("}") + 1])
    assert shown == json.loads((full / "config.json").read_text())
