"""Plain text (pt), marked answers (kto), some layers (freeze), and LoRA+."""

import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from convert import merge
from convert.data import encode, prepare
from convert.data.encode import Judged
from convert.model import chat_format
from convert.train import cli, evaluate, finetune, load_model
from convert.train.losses import Feedback, LossHead, reference
from convert.train.trainer import Loop
from edge.artefact import manifest
from edge.errors import UsageError
from tests.convert.train.test_checkpoint import same, stop_at
from tests.support import llamafactory_rows
from tests.support.matrix import few
from tests.support.runs import configure
from tests.support.toy import IM_END, IM_START, make_model
from tests.support.training import logits, plain, sample

pytestmark = pytest.mark.usefixtures("short_answers")

QUIET = Console(quiet=True)
LINES = [f"第{n} line of text, {'more ' * (n % 4)}end." for n in range(12)]
MARKED = [
    {"instruction": f"question {n}", "output": f"{'good' if n % 2 else 'bad'} {n}", "label": bool(n % 2)}
    for n in range(8)
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A base model without a chat template."""
    return make_model(tmp_path_factory.mktemp("m") / "base", template=None)


def begin_with(folder):
    """Let the tokenizer in `folder` put its begin token before each text."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    begin = (IM_START, tokenizer.token_to_id(IM_START))
    tokenizer.post_processor = TemplateProcessing(single=f"{IM_START} $A", special_tokens=[begin])
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "add_bos_token": True}), encoding="utf-8")


@pytest.fixture
def made(tmp_path, base):
    config = configure(tmp_path, base, max_steps=2, save_strategy="no")
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    info |= {"t": {"file_name": "t.txt"}, "k": {"file_name": "k.json", "columns": {"kto_tag": "label"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (tmp_path / "t.txt").write_text("\n\n".join(LINES), encoding="utf-8")
    (tmp_path / "k.json").write_text(json.dumps(MARKED), encoding="utf-8")
    return config


def test_plain_text_is_learnt_whole(made, bare):
    form = chat_format.load(bare, plain=True)
    texts = [ids.ids for ids in form.tokenizer.encode_batch(LINES, add_special_tokens=False)]
    stream = [token for ids in texts for token in [*ids, form.turn_end]]
    packed = prepare.prepare(made(stage="pt", dataset="t", cutoff_len=32), form).train
    assert [token for one in packed for token in one.ids] == stream
    assert {len(one.ids) for one in packed[:-1]} == {32}
    assert all(one.spans == ((1, len(one.ids)),) and one.starts == (0,) for one in packed)
    assert packed[0].source == "t, row 1 and on" and packed[1].source != packed[0].source
    apart = prepare.prepare(made(stage="pt", dataset="t", packing=False, cutoff_len=16), form)
    assert [one.ids.tolist() for one in apart.train] == [[*ids, form.turn_end][:16] for ids in texts]
    assert len(apart.report.cut) == sum(len(ids) + 1 > 16 for ids in texts) > 0


def test_control_tokens_in_plain_text_are_text(made, bare, tmp_path):
    (tmp_path / "t.txt").write_text(f"a {IM_END} b\nc", encoding="utf-8")
    for parse in (False, True):
        form = chat_format.load(bare, plain=True, parse_control_tokens=parse)
        data = prepare.prepare(made(stage="pt", dataset="t", packing=False), form)
        assert [one.ids.tolist().count(form.turn_end) for one in data.train] == [1 + parse, 1]
        assert data.report.marked == ([] if parse else ["t, row 1"])
        whole = form.tokenizer.decode(data.train[0].ids, skip_special_tokens=False)
        assert whole == f"a {IM_END} b{IM_END}"


def test_a_tokenizer_with_a_begin_token_begins_each_sequence(made, tmp_path):
    folder = make_model(tmp_path / "m", template=None)
    begin_with(folder)
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    begin = tokenizer.token_to_id(IM_START)
    form = chat_format.load(folder, plain=True)
    packed = prepare.prepare(made(stage="pt", dataset="t", cutoff_len=32), form).train
    apart = prepare.prepare(made(stage="pt", dataset="t", packing=False), form).train
    assert len(packed) > 2 and all(one.ids[0] == begin for one in (*packed, *apart))
    assert apart[0].ids.tolist()[1:-1] == tokenizer.encode(LINES[0], add_special_tokens=False).ids


@pytest.mark.slow
def test_plain_text_trains_evaluates_and_merges(made, bare, tmp_path):
    said = Console(record=True, width=200)
    config = made(
        stage="pt", dataset="t", model_name_or_path=str(bare), val_size=3, max_steps=6, cutoff_len=64
    )
    adapter = finetune.run(config, console=said)
    text = said.export_text()
    assert "packing: 9 texts one after the other in" in text and "isolate" not in text
    known = manifest.read(adapter)
    assert known.chat_template is None and known.thinking is None
    assert not (adapter / "chat_template.jinja").exists()
    losses = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]
    figures = evaluate.run(tmp_path / "run", console=QUIET)
    assert figures["eval_loss"] < figures["base_eval_loss"] and figures["predict_samples"] == 3
    merged = merge.run(tmp_path / "run", console=QUIET)
    assert not (merged / "chat_template.jinja").exists() and manifest.read(merged).stop_ids


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_the_package_llamafactory_makes_the_same_of_texts(made, tmp_path, packing, begins):
    """All ids; but the last tokens, which fill no sequence, are left out there when packing."""
    if not (llamafactory_rows.PEERS / "llamafactory").is_dir():
        pytest.skip("the package llamafactory is not there: make .peers/installed")
    folder = make_model(tmp_path / "m", template=None)
    if begins:
        begin_with(folder)
    asked = {"tokenizer": str(folder), "templates": ["default"], "thinking": False}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.llamafactory_rows"],
        input=json.dumps(asked | {"texts": LINES, "packing": packing, "begins": begins}),
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)["default"]
    form = chat_format.load(folder, plain=True)
    ours = prepare.prepare(made(stage="pt", dataset="t", packing=packing, cutoff_len=32), form).train
    assert len(theirs) > 5
    assert [one.ids.tolist() for one in ours][: len(theirs)] == theirs
    assert len(ours) - len(theirs) == packing


PRETRAIN = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: c4_demo
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/pretrain
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
KTO = PRETRAIN.replace("stage: pt", "stage: kto\npref_beta: 0.1").replace(
    "dataset: c4_demo", "dataset: kto_en_demo\ntemplate: llama3"
)


@pytest.mark.slow
@pytest.mark.parametrize("text", [PRETRAIN, KTO])
def test_examples_of_llamafactory_run_through(tmp_path, base, text):
    """Their keys, values and entries of dataset_info.json; places, and the template, are this test's own."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entries = {
        "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
        "kto_en_demo": {
            "file_name": "kto_en_demo.json", "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"}, "tags": tags,
        },
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    lines = [json.dumps({"text": line, "timestamp": "2019-04-25", "url": "http://x"}) for line in LINES]
    (tmp_path / "c4_demo.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"messages": talk, "label": bool(n % 2)} for n in range(4)]
    (tmp_path / "kto_en_demo.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
    places = {"model_name_or_path": base, "dataset_dir": tmp_path, "output_dir": tmp_path / "run"}
    words = [*(f"{key}={value}" for key, value in places.items()), "use_cpu=true", "cutoff_len=64"]
    words.append("logging_steps=2")  # of few steps
    words += ["template=chatml"] if text is KTO else []
    assert cli.main([str(tmp_path / "theirs.yaml"), *words]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "training_loss.svg").is_file()


# Of two rows with log probabilities -3 and -4, -5 and -2 before; with other answers -6, -6, before -7 and -9.
@pytest.mark.parametrize(("others", "z"), [((-6.0, -6.0), 2.0), ((-9.0, -9.0), 0.0)])
def test_the_loss_of_marked_answers(made, others, z):
    class Head:
        def sums(self, batch, device):
            other = "other" in batch[0].source
            return torch.tensor(others if other else (-3.0, -4.0)), torch.tensor([2.0, 4.0])

    items = [
        Judged(f"r{n}", sample(4, seed=n), sample(4, seed=n, name="other"), good)
        for n, good in enumerate((True, False))
    ]
    logs = {id(items[0]): (-5.0, -7.0), id(items[1]): (-2.0, -9.0)}
    config = made(
        stage="kto", dataset="k", pref_beta=0.5, kto_chosen_weight=2.0, kto_rejected_weight=3.0, pref_ftx=0.1
    )
    losses, rows = Feedback(Head(), config, logs)(items, "cpu")

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    good = 2 * (1 - sigmoid(0.5 * (2 - z))) + 0.1 * 3 / 2
    bad = 3 * (1 - sigmoid(0.5 * (z + 2)))
    assert losses.tolist() == pytest.approx([good, bad], rel=1e-6) and rows.tolist() == [0, 1]


def test_each_marked_row_has_the_answer_of_the_one_before(made, base):
    form = chat_format.load(base)
    items = prepare.prepare(made(stage="kto", dataset="k"), form).train
    assert [item.good for item in items] == [row["label"] for row in MARKED]
    for before, item in zip([items[-1], *items[:-1]], items, strict=True):
        start = item.answer.spans[0][0]
        assert item.other.ids[:start] == item.answer.ids[:start]
        assert item.other.ids[start:] == before.answer.ids[before.answer.spans[0][0] :]
    said = prepare.prepare(made(stage="kto", dataset="k"), form).digest()
    items[0] = encode.Judged(items[0].source, items[0].answer, items[0].other, not items[0].good)
    turned = prepare.prepare(made(stage="kto", dataset="k"), form)
    turned.train = items
    assert turned.digest() != said


@pytest.mark.slow
def test_marked_answers_are_learnt_and_avoided(made, base, tmp_path):
    config = made(stage="kto", dataset="k", max_steps=16, pref_beta=0.5, quantization_bit=4, val_size=2)
    adapter = finetune.run(config, console=QUIET)
    log = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(0.5, abs=1e-3) and losses[-1] < 0.4
    form = chat_format.load(base)
    items = prepare.prepare(made(stage="kto", dataset="k"), form).train
    place = load_model.Place("cpu", torch.float32, True)
    tuned = evaluate.load_tuned(adapter, base, config, place).eval()
    after = reference(LossHead(tuned), items, "cpu", 8)
    with tuned.disable_adapter():
        before = reference(LossHead(tuned), items, "cpu", 8)
    gains: dict[bool, list[float]] = {True: [], False: []}
    for one in items:
        gains[one.good].append(after[id(one)][0] - before[id(one)][0])
    assert min(gains[True]) > max(gains[False])
    figures = evaluate.run(tmp_path / "run", max_new_tokens=4, with_base=False, console=QUIET)
    assert figures["predict_samples"] == 2


def test_stages_say_what_rows_they_need(made, base):
    form = chat_format.load(base)
    with pytest.raises(UsageError, match="stage: kto needs answers marked good or bad, and 'd' names"):
        prepare.prepare(made(stage="kto"), form)
    with pytest.raises(UsageError, match=r"(?s)'k' holds good and bad answers \(kto_tag\).*stage: kto"):
        prepare.prepare(made(dataset="k"), form)
    for stage in ("rm", "ppo"):
        with pytest.raises(UsageError, match=r"(?s)reward models and PPO are not trained here.*dpo.*kto"):
            made(stage=stage)
    for keys in ({"packing": True}, {"train_on_prompt": True}, {"pref_loss": "ipo"}):
        with pytest.raises(UsageError, match="has no meaning in stage: kto"):
            made(stage="kto", dataset="k", **keys)
    with pytest.raises(UsageError, match="mask_history has no meaning in stage: pt"):
        made(stage="pt", dataset="t", mask_history=True)


@pytest.mark.slow
@pytest.mark.matrix
def test_trls_loss_and_gradients_of_marked_answers(made, base, tmp_path):
    if not (llamafactory_rows.PEERS / "trl").is_dir():
        pytest.skip("the package trl is not there: make .peers/installed")
    config = made(stage="kto", dataset="k", pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.5)
    model = load_model.add_adapter(plain(base), config)
    model.save_pretrained(tmp_path / "before", save_embedding_layers=False)
    form = chat_format.load(base)
    items = prepare.prepare(config, form).train
    head = LossHead(model.eval())
    logs = reference(head, items, "cpu", 8)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    model.save_pretrained(tmp_path / "after", save_embedding_layers=False)
    losses, _ = Feedback(head, config, logs)(items, "cpu")
    losses.mean().backward()
    rows = []
    for item in items:
        ids, start = item.answer.ids, item.answer.spans[0][0]
        prompt, completion = (
            form.tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:start], ids[start:])
        )
        rows.append({"prompt": prompt, "completion": completion, "label": item.good})
    places = {"base": base, "before": tmp_path / "before", "after": tmp_path / "after", "out": tmp_path}
    asked = {name: str(path) for name, path in places.items()}
    asked |= {"rows": rows, "beta": 0.3, "weights": [1.5, 0.5]}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.trl_kto"],
        input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses.mean().item() == pytest.approx(json.loads(done.stdout)["loss"], rel=1e-5)
    theirs = load_file(tmp_path / "gradients.safetensors")
    ours = {
        name.replace(".default", ""): one.grad
        for name, one in model.named_parameters()
        if one.grad is not None
    }
    assert set(ours) == set(theirs)
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "moved"),
    [
        ({"freeze_trainable_layers": 1}, {"layers.1."}),
        ({"freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp"}, {"layers.0.mlp."}),
        ({"freeze_trainable_layers": 1, "freeze_trainable_modules": "self_attn",
          "freeze_extra_modules": "norm"}, {"layers.1.self_attn.", "model.norm."}),
    ],
)  # fmt: skip
def test_some_layers(made, base, keys, moved):
    target = finetune.run(made(finetuning_type="freeze", learning_rate=1e-3, **keys), console=QUIET)
    assert target.name == "merged"
    trained, before = plain(target), plain(base)
    for name, one in trained.named_parameters():
        same = torch.equal(one, before.get_parameter(name).half().float())
        assert same != any(part in name for part in moved), name


@pytest.mark.slow
def test_layers_that_are_not_there(made, base):
    for keys, words in (
        ({"freeze_trainable_layers": 3}, "freeze_trainable_layers: 3: the model has 2 layers"),
        ({"freeze_trainable_layers": 0}, "freeze_trainable_layers: 0"),
        ({"freeze_trainable_modules": "mlpp"}, "(?s)the model has no mlpp.*mlp"),
        ({"freeze_extra_modules": "head"}, "(?s)freeze_extra_modules: the model has no head.*norm"),
    ):
        with pytest.raises(UsageError, match=words):
            load_model.unfreeze(plain(base), made(finetuning_type="freeze", **keys))
    with pytest.raises(UsageError, match="finetuning_type: freeze cannot train 4-bit weights"):
        made(finetuning_type="freeze", quantization_bit=4)
    with pytest.raises(UsageError, match="use_dora cannot be computed over 8-bit weights"):
        made(use_dora=True, quantization_bit=8)


@pytest.mark.slow
def test_the_two_matrices_learn_at_rates_of_their_own(made, base):
    """LoRA+: with Adam the first step moves each weight by its own learning rate."""
    moves = {}
    for ratio in (None, 8.0):
        config = made(loraplus_lr_ratio=ratio, learning_rate=1e-4, max_steps=1, warmup_steps=0, use_dora=True)
        model = load_model.add_adapter(plain(base), config)
        before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        generator = torch.Generator().manual_seed(1)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                before[name] = one.data.normal_(0, 0.05, generator=generator).clone()
        items = prepare.prepare(config, chat_format.load(base)).train
        loop = Loop(model, items, config, device="cpu", dtype=torch.float32)
        loop.run(lambda state: None)
        changes = {
            name: float((one.detach() - before[name]).abs().max())
            for name, one in model.named_parameters()
            if name in before
        }
        kinds = ("lora_A", "lora_B", "magnitude")
        moves[ratio] = {kind: max(changes[name] for name in changes if kind in name) for kind in kinds}
    assert moves[None] == pytest.approx(dict.fromkeys(moves[None], 1e-4), rel=0.01)
    assert moves[8.0] == pytest.approx({"lora_A": 1e-4, "lora_B": 8e-4, "magnitude": 8e-4}, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, pytest.param({"use_rslora": True}, marks=pytest.mark.matrix)])
def test_an_adapter_over_eight_bits_is_merged_into_what_it_saw(made, base, tmp_path, keys):
    config = made(quantization_bit=8, max_steps=6, **keys)
    said = Console(record=True, width=200)
    finetune.run(config, console=said)
    assert "in 8-bit on cpu" in said.export_text()
    log = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]
    said = Console(record=True, width=200)
    merged = merge.run(tmp_path / "run", console=said)
    assert "added to the dequantised 8-bit base" in said.export_text()
    proof = manifest.read(merged).verify
    assert proof["logits"]["kl_mean"] < 1e-4
    # Against the model as it was trained, 8-bit products and all.
    place = load_model.choose_place(config)
    tuned = evaluate.load_tuned(tmp_path / "run" / "adapter", base, config, place).eval()
    assert torch.nn.functional.cosine_similarity(logits(tuned), logits(plain(merged)), dim=-1).min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param({}, marks=pytest.mark.matrix),
        {"use_dora": True},
        {"pissa_init": True},
        {"loftq_init": True, "quantization_bit": 4},
    ],
)
def test_rank_stabilised_adapters_of_every_start(made, base, tmp_path, start):
    """The scale is alpha / sqrt(rank) in training, in adapter_config.json and in what is merged."""
    config = made(use_rslora=True, lora_rank=4, lora_alpha=8, max_steps=3, **start)
    adapter = finetune.run(config, console=QUIET)
    known = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert known["use_rslora"] is True or "pissa_init" in start
    merged = merge.run(tmp_path / "run", console=QUIET)
    assert manifest.read(merged).verify["logits"]["kl_mean"] < 1e-4
    tuned = evaluate.load_tuned(adapter, base, config, load_model.choose_place(config)).eval()
    assert torch.nn.functional.cosine_similarity(logits(plain(merged)), logits(tuned), dim=-1).min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", few(["lora", "full"], ["lora"]))
def test_added_tokens_are_trained_merged_and_kept(made, tmp_path, tied, kind):
    """One id each, rows that begin as the mean with noise and are trained, in a tokenizer that knows."""
    base = make_model(tmp_path / "m", tied=tied)
    rows = [{"instruction": f"<|ask|> 神奇海螺 {n}", "output": f"<|say|> {n}"} for n in range(8)]
    (tmp_path / "d.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    config = made(
        model_name_or_path=str(base), add_special_tokens="<|ask|>,<|say|>", add_tokens="神奇海螺", val_size=2,
        parse_control_tokens=True,
        finetuning_type=kind, max_steps=4, eval_answers=1, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    target = finetune.run(config, console=QUIET)
    form = chat_format.load(target)
    ids = [form.tokenizer.token_to_id(token) for token in ("神奇海螺", "<|ask|>", "<|say|>")]
    assert ids == [384, 385, 386]
    figures = evaluate.run(tmp_path / "run", max_new_tokens=4, console=QUIET)
    assert math.isfinite(figures["eval_loss"])
    if kind == "lora":
        target = merge.run(tmp_path / "run", console=QUIET)
        assert manifest.read(target).verify["logits"]["kl_mean"] < 1e-4
    known = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert known["vocab_size"] == 448 and known["tie_word_embeddings"] is tied
    table = load_file(target / "model.safetensors")["model.embed_tokens.weight"].float()
    fresh = plain(base)
    load_model.grow(fresh, 387, config.seed)
    begun = fresh.get_input_embeddings().weight.detach()
    assert table.shape == begun.shape == (448, 64)
    # Trained rows moved; a row of padding, which no row of the data has, is where it began.
    assert all((table[token] - begun[token]).abs().max() > 1e-3 for token in ids[:2])
    if not tied:
        assert torch.allclose(table[440], begun[440], atol=1e-3)
    assert chat_format.load(target).tokenizer.encode("<|say|>", add_special_tokens=False).ids == [386]


@pytest.mark.slow
def test_the_end_token_of_a_template_is_added(made, bare, tmp_path):
    config = made(model_name_or_path=str(bare), template="gemma", resize_vocab=True)
    with pytest.raises(UsageError, match="resize_vocab: true, which adds it"):
        finetune.run(made(model_name_or_path=str(bare), template="gemma"), console=QUIET)
    adapter = finetune.run(config, console=QUIET)
    form = chat_format.load(adapter)
    assert form.tokenizer.token_to_id("<end_of_turn>") == form.turn_end == 384
    merged = merge.run(tmp_path / "run", console=QUIET)
    assert 384 in manifest.read(merged).stop_ids


def test_tokens_are_added_to_new_adapters_alone(made, tmp_path):
    for keys in ({"adapter_name_or_path": str(tmp_path)}, {"finetuning_type": "freeze"}):
        with pytest.raises(UsageError, match="trains the tables of tokens in a new adapter"):
            made(resize_vocab=True, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"resize_vocab": True}, {"additional_target": "embed_tokens,norm"}])
def test_modules_trained_beside_an_adapter_over_16_bits(made, tmp_path, keys, monkeypatch):
    """They are float32 over a bfloat16 model, in training, in its evaluations and in their answers."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    config = made(val_size=2, eval_strategy="steps", eval_steps=1, eval_answers=1, **keys)
    adapter = finetune.run(config, console=QUIET)
    tensors = load_file(adapter / "adapter_model.safetensors")
    table = next(one for name, one in tensors.items() if "embed_tokens" in name)
    assert table.dtype == torch.float32
    merged = merge.run(tmp_path / "run", console=QUIET)
    assert manifest.read(merged).verify["logits"]["kl_mean"] < 1e-3


@pytest.mark.slow
def test_a_run_of_marked_answers_goes_on_to_the_bit(made, monkeypatch):
    """With rates of their own for both matrices, and trained tables: stopped, resumed, the same weights."""
    keys = {
        "stage": "kto", "dataset": "k", "loraplus_lr_ratio": 4.0, "resize_vocab": True, "max_steps": 6,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = finetune.run(made("whole", **keys), console=QUIET)
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(finetune.Stopped):
            finetune.run(made("cut", **keys), console=QUIET)
    same(whole, finetune.run(made("cut", resume_from_checkpoint=True, **keys), console=QUIET))
