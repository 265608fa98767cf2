"""The keys of a training configuration: names and defaults are LLaMA-Factory's and transformers'.

Each field's metadata has its kind, its help text and its limits; `convert.config` reads, types and checks them.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit")
PREFERENCES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
STRATEGIES = ("no", "steps", "epoch")
MIXES = ("concat", "interleave_under", "interleave_over")
ANY = object()


def _key(default: Any, kind: str, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    # Model
    model_name_or_path: str = _key(MISSING, "text", "a folder in transformers' format, or a hub id")
    adapter_name_or_path: str | None = _key(None, "text", "a run or adapter to go on from, with its rank")
    model_revision: str = _key("main", "text", "branch, tag or commit on the hub")
    quantization_bit: int | None = _key(
        None, "int", "4: train over NF4 weights (QLoRA); none: over 16-bit weights", choices=(4,)
    )
    double_quantization: bool = _key(True, "bool", "quantise the scales of the 4-bit blocks too")
    disable_gradient_checkpointing: bool = _key(
        False, "bool", "keep activations: faster by a third, needs more memory"
    )
    enable_liger_kernel: bool = _key(False, "bool", "fused layers of the package liger-kernel (CUDA only)")
    # Method
    stage: str = _key("sft", "text", "sft: answers; dpo: preferences", choices=("sft", "dpo"))
    finetuning_type: str = _key(
        "lora", "text", "lora: an adapter; full: every weight (small models)", choices=("lora", "full")
    )
    lora_rank: int = _key(8, "int", "rank of the adapter", low=1)
    lora_alpha: int | None = _key(None, "int", "scale of the adapter; none: twice the rank", low=1)
    lora_dropout: float = _key(0.0, "float", "dropout before the adapter", low=0.0, below=1.0)
    lora_target: tuple[str, ...] = _key(
        ("all",), "names", "names of the layers to adapt; all: every linear layer except the output head"
    )
    use_rslora: bool = _key(False, "bool", "scale by alpha/sqrt(rank) in place of alpha/rank")
    use_dora: bool = _key(False, "bool", "learn the length of each weight's columns apart (DoRA)")
    pissa_init: bool = _key(False, "bool", "start from the weights' principal components (16-bit LoRA)")
    pissa_iter: int = _key(16, "int", "steps of the fast SVD of pissa_init; -1: the whole one", low=-1)
    loftq_init: bool = _key(False, "bool", "start from what 4 bits lost of the weights (QLoRA)")
    neftune_noise_alpha: float | None = _key(None, "float", "noise on the embeddings, e.g. 5", low=0.0)
    pref_loss: str = _key("sigmoid", "text", "the preference loss of stage dpo", choices=PREFERENCES)
    pref_beta: float = _key(0.1, "float", "how far preferences may pull from the start", above=0.0)
    pref_ftx: float = _key(0.0, "float", "weight of the plain loss on the chosen answers", low=0.0)
    simpo_gamma: float = _key(0.5, "float", "margin of pref_loss simpo", above=0.0)
    dpo_label_smoothing: float = _key(0.0, "float", "share of wrong labels assumed", low=0.0, high=0.5)
    # Data
    dataset: tuple[str, ...] = _key(MISSING, "names", "names in dataset_info.json, separated by commas")
    eval_dataset: tuple[str, ...] | None = _key(None, "names", "data sets to evaluate on; excludes val_size")
    dataset_dir: str = _key("data", "text", "the folder with dataset_info.json")
    template: str | None = _key(
        None, "text", "LLaMA-Factory's template name: checked only, the model's own chat template is used"
    )
    cutoff_len: int = _key(2048, "int", "longest row in tokens; longer ones are cut, and counted", low=8)
    max_samples: int | None = _key(None, "int", "at most so many rows of each data set", low=1)
    val_size: float = _key(0.0, "float", "rows held out: below 1 a fraction, from 1 a count", low=0.0)
    mix_strategy: str = _key(
        "concat", "text", "several data sets: one after the other, or drawn in turn until the first "
        "(under) or the last (over) of them has ended", choices=MIXES,
    )  # fmt: skip
    interleave_probs: tuple[float, ...] | None = _key(
        None, "floats", "share of each data set in what is drawn, separated by commas"
    )
    packing: bool = _key(False, "bool", "several rows in one sequence; they do not see each other")
    neat_packing: bool = _key(False, "bool", "the same as packing here")
    train_on_prompt: bool = _key(False, "bool", "loss on the questions too")
    mask_history: bool = _key(False, "bool", "no loss on answers before the last one")
    default_system: str | None = _key(None, "text", "system message for rows that have none")
    enable_thinking: bool | None = _key(
        True, "bool?", "rows without a thought, true: learn an empty one; false: get it in the prompt; "
        "null: are left alone (only for templates that think)",
    )  # fmt: skip
    strict: bool = _key(False, "bool", "stop at bad rows in place of leaving them out")
    # Trainer
    output_dir: str = _key(MISSING, "text", "the run folder; the adapter goes to output_dir/adapter")
    per_device_train_batch_size: int = _key(8, "int", "rows in one forward pass", low=1)
    per_device_eval_batch_size: int = _key(8, "int", "rows in one forward pass of validation", low=1)
    gradient_accumulation_steps: int = _key(1, "int", "forward passes in one optimizer step", low=1)
    learning_rate: float = _key(5e-5, "float", "peak learning rate", above=0.0)
    num_train_epochs: float = _key(3.0, "float", "passes over the data", above=0.0)
    max_steps: int = _key(-1, "int", "stop after so many optimizer steps; -1: by epochs", low=-1)
    lr_scheduler_type: str = _key("linear", "text", "shape of the learning rate", choices=SCHEDULES)
    warmup_ratio: float = _key(0.0, "float", "share of the steps that warm up", low=0.0, high=1.0)
    warmup_steps: int = _key(0, "int", "steps that warm up; wins over warmup_ratio", low=0)
    max_grad_norm: float = _key(1.0, "float", "longer gradients are scaled down to this; 0: never", low=0.0)
    weight_decay: float = _key(0.0, "float", "AdamW's weight decay", low=0.0)
    fsdp: str | None = _key(
        None, "text", "spread the frozen weights over processes, for a base that does not fit on one card",
        choices=("full_shard", "full_shard auto_wrap"),
    )  # fmt: skip
    optim: str = _key("adamw_torch", "text", "the optimizer; paged_adamw_8bit needs CUDA", choices=OPTIMIZERS)
    bf16: bool = _key(False, "bool", "compute in bfloat16")
    fp16: bool = _key(False, "bool", "compute in float16")
    use_cpu: bool = _key(False, "bool", "train on the CPU even where there is a GPU")
    disable_shuffling: bool = _key(False, "bool", "take the rows in their order")
    seed: int = _key(42, "int", "of shuffling, of the adapter's start and of dropout", low=0)
    # While it runs
    logging_steps: int = _key(5, "int", "steps between two lines of trainer_log.jsonl", low=1)
    plot_loss: bool = _key(False, "bool", "draw training_loss.svg")
    report_to: tuple[str, ...] = _key(("none",), "names", "none, or tensorboard", of=("none", "tensorboard"))
    save_strategy: str = _key("steps", "text", "when a checkpoint is written", choices=STRATEGIES)
    save_steps: int = _key(500, "int", "steps between two checkpoints", low=1)
    save_total_limit: int | None = _key(None, "int", "checkpoints to keep, the best one beside them", low=1)
    save_only_model: bool = _key(False, "bool", "checkpoints without the optimizer: no resuming from them")
    resume_from_checkpoint: str | None = _key(
        None, "resume", "true: go on from the last whole checkpoint; or the path of one"
    )
    eval_strategy: str = _key("no", "text", "when to evaluate; at the end in any case", choices=STRATEGIES)
    eval_steps: int | None = _key(None, "int", "steps between two evaluations; none: logging_steps", low=1)
    eval_answers: int = _key(2, "int", "held-out questions to answer at each evaluation", low=0)
    early_stopping_steps: int | None = _key(
        None, "int", "stop after so many evaluations without a better loss; the best is kept", low=1
    )
    load_best_model_at_end: bool = _key(False, "bool", "end with the weights of the best evaluation")
    ignore_memory: bool = _key(False, "bool", "train although the estimate does not fit into memory")
    # Not a key: what was accepted without effect.
    warnings: tuple[str, ...] = ()

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def packs(self) -> bool:
        return self.packing or self.neat_packing

    @property
    def keeps_best(self) -> bool:
        return self.load_best_model_at_end or self.early_stopping_steps is not None


FIELDS = {one.name: one for one in fields(TrainConfig) if one.metadata}
REQUIRED = ("model_name_or_path", "dataset", "output_dir")

# Keys of LLaMA-Factory that we do not act on: the values that change nothing here, and what to say of them.
_NO_CODE = "is ignored: models are loaded with transformers' own classes, code from a repository is never run"
ACCEPTED: dict[str, tuple[tuple[Any, ...] | object, str]] = {
    "add_tokens": ((None,), ""),
    "additional_target": ((None,), ""),
    "cache_dir": ((None,), ""),
    "compute_accuracy": ((False,), ""),
    "create_new_adapter": ((False,), ""),
    "dataloader_num_workers": (ANY, ""),
    "ddp_find_unused_parameters": (ANY, ""),
    "ddp_timeout": (ANY, ""),
    "deepspeed": ((None,), ""),
    "do_eval": (ANY, ""),
    "do_predict": ((False,), ""),
    "do_train": ((True,), ""),
    "flash_attn": (("auto", "sdpa"), ""),
    "gradient_checkpointing": ((True,), ""),
    "image_max_pixels": (ANY, ""),
    "include_num_input_tokens_seen": (ANY, ""),
    "logging_dir": (ANY, ""),
    "loraplus_lr_ratio": ((None,), ""),
    "low_cpu_mem_usage": (ANY, ""),
    "overwrite_cache": (ANY, ""),
    "overwrite_output_dir": (ANY, "is ignored: --overwrite replaces what an earlier run made"),
    "preprocessing_num_workers": (ANY, ""),
    "pure_bf16": ((False,), ""),
    "quantization_method": (("bnb", "bitsandbytes"), ""),
    "quantization_type": (("nf4",), ""),
    "ray_num_workers": (ANY, ""),
    "ref_model": ((None,), ""),
    "resize_vocab": ((False,), ""),
    "rope_scaling": ((None,), ""),
    "run_name": (ANY, ""),
    "save_safetensors": ((True,), ""),
    "streaming": ((False,), ""),
    "tokenized_path": ((None,), ""),
    "trust_remote_code": (ANY, _NO_CODE),
    "upcast_layernorm": ((False,), ""),
    "use_fast_tokenizer": ((True,), ""),
    "video_max_pixels": (ANY, ""),
}
