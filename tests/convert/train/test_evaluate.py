"""`edge eval`: numbers as LLaMA-Factory reports them, and both models beside each other."""

import json

import pytest
import yaml
from rich.console import Console

from convert.config import as_yaml, parse
from convert.train import bleu_rouge, eval_cli, finetune
from convert.train import evaluate as evaluation
from edge import cli
from edge.errors import InputError, UsageError
from tests.support.toy import make_model

ROWS = [{"instruction": f"question {n}", "output": "I am the conch. 我是神奇海螺。"} for n in range(12)]


def spaces(text):
    return " ".join(text).split()


# Values of nltk's sentence_bleu (method3) and of rouge_chinese, over characters as words.
@pytest.mark.parametrize(
    ("answer", "reference", "want"),
    [
        ("我是海螺。", "我是海螺。", (100.0, 100.0, 100.0, 100.0)),
        ("我是海螺", "我是神奇海螺。", (21.3416, 72.7273, 44.4444, 72.7273)),
        ("no", "yes", (0.0, 0.0, 0.0, 0.0)),
        ("abcabc", "abc", (30.2138, 100.0, 80.0, 66.6667)),
        ("", "abc", (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_scores(answer, reference, want):
    assert tuple(bleu_rouge.score(answer, reference, spaces).values()) == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_words_are_jiebas():
    split = bleu_rouge.words()
    assert split("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert split("I am, here.\n") == ["I", "am", ",", "here", "."]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    base = make_model(folder / "m")
    (folder / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")

    def config(**changes):
        return parse(
            {
                "model_name_or_path": str(base),
                "dataset": "d",
                "dataset_dir": str(folder),
                "output_dir": str(folder / "run"),
                "use_cpu": True,
                "per_device_train_batch_size": 4,
                "learning_rate": 2e-2,
                "lr_scheduler_type": "constant",
                "save_strategy": "no",
                "max_steps": 40,
                "val_size": 2,
                **changes,
            }
        )

    finetune.run(config(), console=Console(quiet=True))
    return folder, config


@pytest.mark.slow
def test_both_models_on_what_was_held_out(ran, capsys):
    folder, _ = ran
    with pytest.raises(UsageError, match=r"x\.yaml is a configuration"):
        eval_cli.main(["x.yaml"])
    assert eval_cli.main([str(folder / "run"), "--max-new-tokens", "40"]) == 0
    results = json.loads((folder / "run" / "predict_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] < 0.2 and results["base_eval_loss"] > 3
    assert results["perplexity"] == pytest.approx(2.718281828 ** results["eval_loss"], rel=1e-4)
    assert results["predict_bleu-4"] > 90 and results["predict_rouge-l"] > 90
    assert results["base_predict_bleu-4"] < 20
    lines = (folder / "run" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2 and set(first) == {"prompt", "predict", "label", "base_predict"}
    assert first["label"] == ROWS[0]["output"] and first["predict"] == first["label"]
    assert first["prompt"].endswith("<|im_start|>assistant\n")
    assert "predict_rouge-l" in capsys.readouterr().out


@pytest.mark.slow
def test_the_loss_is_that_of_training(ran):
    folder, _ = ran
    results = evaluation.run(folder / "run", max_new_tokens=1, with_base=False, console=Console(quiet=True))
    state = json.loads((folder / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_loss"] == pytest.approx(state["eval_loss"], rel=2e-2)
    assert "base_eval_loss" not in results


@pytest.mark.slow
def test_a_yaml_of_llamafactory_predicts(ran, tmp_path):
    """Its nlg_eval example: no dataset, an adapter, the rows of eval_dataset; and the adapter's effect."""
    folder, _ = ran
    keys = {
        "model_name_or_path": str(folder / "m"),
        "adapter_name_or_path": str(folder / "run"),
        "trust_remote_code": True,
        "stage": "sft",
        "do_predict": True,
        "finetuning_type": "lora",
        "eval_dataset": "d",
        "dataset_dir": str(folder),
        "cutoff_len": 2048,
        "max_samples": 2,
        "output_dir": str(tmp_path / "predict"),
        "overwrite_output_dir": True,
        "per_device_eval_batch_size": 1,
        "predict_with_generate": True,
        "ddp_timeout": 180000000,
        "max_new_tokens": 20,
        "use_cpu": True,
    }
    path = tmp_path / "predict.yaml"

    def predict(**changes):
        path.write_text(yaml.safe_dump({**keys, **changes}), encoding="utf-8")
        assert cli.main(["train", str(path)]) == 0
        text = (tmp_path / "predict" / "generated_predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    greedy = predict(do_sample=False)
    assert [set(line) for line in greedy] == [{"prompt", "predict", "label"}] * 2
    assert [line["predict"] for line in greedy] == [row["output"] for row in ROWS[:2]]
    results = json.loads((tmp_path / "predict" / "predict_results.json").read_text(encoding="utf-8"))
    assert results["predict_bleu-4"] > 90 and results["predict_samples"] == 2
    all_results = json.loads((tmp_path / "predict" / "all_results.json").read_text(encoding="utf-8"))
    assert all_results["predict_rouge-1"] == results["predict_rouge-1"]
    assert not (tmp_path / "predict" / "adapter").exists()
    wild = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
    assert predict(**wild) == predict(**wild) != greedy
    assert predict(**wild, seed=1) != predict(**wild)
    assert predict(top_k=1) == greedy
    assert max(len(line["predict"]) for line in predict(adapter_name_or_path=None, max_new_tokens=1)) < 20


@pytest.mark.slow
def test_a_run_that_trains_predicts_with_what_it_trained(ran, tmp_path):
    _, config = ran
    made = config(output_dir=str(tmp_path / "both"), do_train=True, do_predict=True, max_new_tokens=40)
    path = tmp_path / "both.yaml"
    path.write_text(as_yaml(made), encoding="utf-8")
    assert cli.main(["train", str(path), "do_sample=false"]) == 0
    results = json.loads((tmp_path / "both" / "all_results.json").read_text(encoding="utf-8"))
    assert results["train_loss"] < 1 and results["predict_bleu-4"] > 90


@pytest.mark.slow
def test_rows_that_were_trained_on_are_said(ran):
    folder, _ = ran
    said = Console(record=True, width=200)
    evaluation.run(folder / "run", dataset=("d",), max_samples=4, max_new_tokens=1, console=said)
    assert "4 of these rows were trained on" in said.export_text()


@pytest.mark.slow
def test_nothing_to_evaluate(ran, tmp_path):
    folder, config = ran
    with pytest.raises(InputError, match="train first"):
        evaluation.run(tmp_path)
    finetune.run(
        config(val_size=0, output_dir=str(folder / "other"), max_steps=1), console=Console(quiet=True)
    )
    with pytest.raises(UsageError, match="--dataset NAME"):
        evaluation.run(folder / "other")


@pytest.mark.slow
def test_weights_that_were_all_trained(ran):
    folder, config = ran
    how = {"finetuning_type": "full", "learning_rate": 1e-3, "output_dir": str(folder / "full")}
    target = finetune.run(config(**how), console=Console(quiet=True))
    assert target == folder / "full" / "merged"
    results = evaluation.run(folder / "full", max_new_tokens=4, console=Console(quiet=True))
    assert results["eval_loss"] < 0.5 and results["base_eval_loss"] > 3
