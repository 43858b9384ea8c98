"""The command line: one clear line and status 2 for what a user can mend."""

from __future__ import annotations

import json

import pytest

from unime_ray.cli import main


def _fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return stop.value.code, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", "dem"], "did you mean 'demo'"),
        (["judge", "--config", "demo", "--set", "judges.tiny.promt_order=x"], "did you mean 'prompt_order'"),
        (["runn"], "run"),
        (["inspect", "/nonexistent/run"], "is it a run folder"),
        (["run", "--config", "demo", "--set", "run=/proc/nowhere"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    code, err = _fails(arguments, capsys)
    assert code == 2
    assert message in err


def test_init_writes_a_config_that_loads_and_refuses_to_overwrite(tmp_path, capsys):
    from unime_ray.config import load_config

    path = tmp_path / "mine.yaml"
    with pytest.raises(SystemExit) as done:
        main(["init", str(path)])
    assert done.value.code in (0, None)
    assert load_config(str(path)).embedders["mine"].loss == "judge_kl"
    code, err = _fails(["init", str(path)], capsys)
    assert code == 2
    assert "already there" in err


def test_a_corpus_that_is_not_there_is_named(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {tmp_path}/run\ncorpus: {{sources: [{{format: jsonl, path: {tmp_path}/no.jsonl}}]}}\n")
    code, err = _fails(["validate", "--config", str(path)], capsys)
    assert code == 2
    assert "no.jsonl" in err


def test_what_a_corpus_calls_its_datasets_is_printed_as_it_is(tmp_path, capsys):
    """`[/x]` would end the command, and `[red]` vanish, if names were read as markup."""
    rows = [{"query_text": "q", "pos_text": "p", "dataset": name} for name in ("[/x]", "[red]", "plain")]
    rows.append({"query_text": "q", "pos_text": "p", "negatives": [["[/a]", "b", "c"]]})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {tmp_path}/run\ncorpus: {{sources: [{{format: jsonl, path: {tmp_path}/c.jsonl}}]}}\n")
    with pytest.raises(SystemExit) as done:
        main(["validate", "--config", str(path), "--set", "corpus.max_error_rate=0.5"])
    shown = capsys.readouterr().out
    assert done.value.code in (0, None)
    assert all(name in shown for name in ("[/x]", "[red]", "a [text, picture] pair"))


def test_importing_the_package_imports_neither_torch_nor_ray():
    import subprocess
    import sys

    script = "import sys, unime_ray.cli, unime_ray.pipeline; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
