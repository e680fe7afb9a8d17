"""Numbers in the docs are those of the committed result files, and the files say what they must."""

import json
import re

from benchmarks import results_page


def test_the_page_and_the_readme_are_generated():
    assert results_page.PAGE.read_text() == results_page.page()
    text = results_page.README.read_text()
    assert results_page.readme(text) == text


def test_the_main_job_result_records_what_it_depends_on():
    result = json.loads((results_page.RESULTS / "main_job.json").read_text())
    assert {"platform", "cpu", "cores"} <= set(result["machine"])
    assert result["eval_tokens"] == 16384
    for row in [result["demo"], *result["rows"].values()]:
        assert {"command", "seed", "versions", "git", "keep", "texts", "warnings"} <= set(row)
        assert not re.search(r"(^|\s)/", row["command"])  # no path of the machine it ran on
    for row in result["rows"].values():
        assert row["keep"] <= 0.8
        assert len(row["texts"]) == 2


def test_the_main_job_meets_its_targets():
    result = json.loads((results_page.RESULTS / "main_job.json").read_text())
    assert result["demo"]["wall_seconds"] <= 6 * 60
    assert result["demo"]["peak_rss_bytes"] <= 6e9
    ratios = {
        name: next(iter(row["texts"].values()))["ratio"] for name, row in result["rows"].items()
    }
    assert ratios["default"] <= 1.9
    assert ratios["default"] < ratios["activation_svd_interpolative"] < ratios["svd"]
