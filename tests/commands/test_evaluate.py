"""`latentdiff evaluate` on folders that are no runs of stage 2."""

from command_line import refusal
from tiny import tiny_pipeline


def test_evaluate_refuses_a_folder_that_is_no_run(capsys, tmp_path):
    error = refusal(capsys, "evaluate", str(tmp_path / "nowhere"))
    assert error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1
    folder = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    error = refusal(capsys, "evaluate", str(folder))  # a pipeline, but without the config that it was trained with
    assert error == f"error: config {folder}/config.yaml does not exist\n"
