"""Every key of a training configuration: its type, default, limits and what it does, in English and Chinese.

This one table is what `convert.config` reads YAML by and what `convert.config_schema` makes a JSON Schema of.
Names and defaults are LLaMA-Factory's and, for the trainer's keys, transformers'.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_8bit")
PREFERENCES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
STRATEGIES = ("no", "steps", "epoch")
TRACKERS = ("none", "all", "tensorboard", "wandb", "trackio", "swanlab", "mlflow")
MIXES = ("concat", "interleave_under", "interleave_over")
# A number written as text: YAML 1.1 takes 1e-4, without a dot, for one.
NUMBER = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
# What a value of each kind is called in errors.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "bool?": "true or false",
    "text": "text",
    "names": "names",
    "floats": "numbers",
    "resume": "true, false or a path",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one key may be, and what it does. kind: one of KINDS; `bool?`: null is a value of its own.

    names: what the names in a list may be, where that is limited. ours: no key of LLaMA-Factory or
    transformers. default: MISSING where the key must be given.
    """

    kind: str
    help: str
    help_zh: str
    default: Any
    choices: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None
    ours: bool = False


def _key(default: Any, kind: str, help: str, help_zh: str, **more: Any) -> Any:
    key = Key(kind=kind, help=help, help_zh=help_zh, default=default, **more)
    return field(default=default, metadata={"key": key})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. warnings: on keys that have no effect and values that are hardly meant."""

    # Model
    model_name_or_path: str = _key(
        MISSING, "text", "a folder in transformers' format, or a hub id",
        "transformers 格式的模型文件夹，或模型仓库的名称",
    )  # fmt: skip
    adapter_name_or_path: tuple[str, ...] | None = _key(
        None, "names", "a run or adapter to continue from, with its rank; of several, separated by commas, "
        "the others are merged into the base first",
        "从已有的运行或适配器继续训练，沿用其秩；多个用逗号分隔，除最后一个外先合并进基座模型",
    )  # fmt: skip
    create_new_adapter: bool = _key(
        False, "bool", "put a new adapter on top of adapter_name_or_path, which is merged first",
        "在 adapter_name_or_path 之上训练新的适配器，前者先合并进基座模型",
    )  # fmt: skip
    cache_dir: str | None = _key(
        None, "text", "where models from the hub are kept; none: HF_HOME says it",
        "从模型仓库下载的模型存放处；不填：由 HF_HOME 指定",
    )  # fmt: skip
    model_revision: str = _key(
        "main", "text", "branch, tag or commit on the hub", "模型仓库的分支、标签或提交"
    )
    resize_vocab: bool = _key(
        False, "bool", "train embeddings and output head whole, with rows for tokens that the model lacks: "
        "added ones, and the end token of `template`",
        "完整训练词嵌入和输出层，并为模型缺少的 token（新增的，以及 template 的结束符）增加行",
    )  # fmt: skip
    add_tokens: tuple[str, ...] | None = _key(
        None, "names", "tokens to add, separated by commas; turns resize_vocab on",
        "新增的 token，用逗号分隔；同时开启 resize_vocab",
    )  # fmt: skip
    add_special_tokens: tuple[str, ...] | None = _key(
        None, "names", "the same for special tokens: not shown in answers, and in texts of rows only "
        "with parse_control_tokens",
        "同上，但为特殊 token：不会出现在回答文本中，数据文本中的仅在 parse_control_tokens 开启时生效",
    )  # fmt: skip
    quantization_bit: int | None = _key(
        None, "int", "4: train over NF4 weights (QLoRA); 8: over LLM.int8 weights; none: over 16-bit weights",
        "4：在 NF4 权重上训练（QLoRA）；8：在 LLM.int8 权重上训练；不填：16 位权重", choices=(4, 8),
    )  # fmt: skip
    double_quantization: bool = _key(
        True, "bool", "quantise the scales of the 4-bit blocks too", "对 4 位分块的缩放系数再做一次量化"
    )
    disable_gradient_checkpointing: bool = _key(
        False, "bool", "keep activations: faster by a third, needs more memory",
        "保留激活值：约快三分之一，但占用更多内存",
    )  # fmt: skip
    rope_scaling: str | None = _key(
        None, "text", "stretch positions where cutoff_len is beyond the model's; output_dir/start is the "
        "base then", "cutoff_len 超出模型长度时扩展位置编码；此时以 output_dir/start 为基座",
        choices=("linear", "dynamic", "yarn", "llama3"),
    )  # fmt: skip
    flash_attn: str = _key(
        "auto", "text", "auto: the device decides; sdpa, fa2, fa3: torch's fused attention; "
        "disabled: plain products",
        "auto：按设备选择；sdpa、fa2、fa3：torch 的融合注意力；disabled：普通矩阵乘法",
        choices=("auto", "sdpa", "fa2", "fa3", "disabled"),
    )  # fmt: skip
    enable_liger_kernel: bool = _key(
        False, "bool", "fused layers of the package liger-kernel (CUDA only)",
        "使用 liger-kernel 的融合层（仅限 CUDA）",
    )  # fmt: skip
    # Method
    stage: str = _key(
        "sft",
        "text",
        "sft: answers; pt: plain text (continued pre-training); dpo: pairs of answers; kto: answers marked "
        "good or bad",
        "sft：学习回答；pt：纯文本（增量预训练）；dpo：学习成对的偏好；kto：学习标为好或坏的回答",
        choices=("sft", "pt", "dpo", "kto"),
    )
    finetuning_type: str = _key(
        "lora", "text", "lora: an adapter; freeze: some layers; full: every weight (both for small models)",
        "lora：训练适配器；freeze：只训练部分层；full：训练全部权重（后两者适合小模型）",
        choices=("lora", "freeze", "full"),
    )  # fmt: skip
    freeze_trainable_layers: int = _key(
        2, "int", "freeze: so many last layers are trained; below 0: so many first ones",
        "freeze：训练最后多少层；小于 0 则为最前面的层",
    )  # fmt: skip
    freeze_trainable_modules: tuple[str, ...] = _key(
        ("all",), "names", "freeze: the parts of these layers that are trained, such as mlp or self_attn",
        "freeze：这些层中要训练的部分，例如 mlp 或 self_attn",
    )  # fmt: skip
    freeze_extra_modules: tuple[str, ...] | None = _key(
        None, "names", "freeze: what is trained outside of the layers, such as norm or embed_tokens",
        "freeze：层以外要训练的部分，例如 norm 或 embed_tokens",
    )  # fmt: skip
    lora_rank: int = _key(8, "int", "rank of the adapter", "适配器的秩", minimum=1)
    lora_alpha: int | None = _key(
        None,
        "int",
        "scale of the adapter; none: twice the rank",
        "适配器的缩放系数；不填：秩的两倍",
        minimum=1,
    )
    lora_dropout: float = _key(
        0.0, "float", "dropout before the adapter", "适配器输入的 dropout", minimum=0.0, exclusive_maximum=1.0
    )
    lora_target: tuple[str, ...] = _key(
        ("all",), "names", "names of the layers to adapt; all: every linear layer except the output head",
        "要加适配器的层名；all：除输出层外的所有线性层",
    )  # fmt: skip
    loraplus_lr_ratio: float | None = _key(
        None, "float", "learning rate of the adapter's B matrices, as a multiple of that of A (LoRA+): 16",
        "适配器 B 矩阵与 A 矩阵学习率之比（LoRA+），例如 16", exclusive_minimum=0.0,
    )  # fmt: skip
    additional_target: tuple[str, ...] | None = _key(
        None, "names", "modules that are trained whole beside the adapter, e.g. embed_tokens,lm_head",
        "与适配器一同完整训练的模块，例如 embed_tokens,lm_head",
    )  # fmt: skip
    pure_bf16: bool = _key(
        False, "bool", "hold what is trained in bfloat16 too: less memory, coarser steps",
        "被训练的权重也用 bfloat16 保存：更省内存，更新更粗",
    )  # fmt: skip
    use_rslora: bool = _key(
        False, "bool", "scale by alpha/sqrt(rank) in place of alpha/rank",
        "缩放取 alpha/√秩，而不是 alpha/秩（rsLoRA）",
    )  # fmt: skip
    use_dora: bool = _key(
        False,
        "bool",
        "learn the magnitude of each weight column apart (DoRA)",
        "单独学习权重各列的模长（DoRA）",
    )
    pissa_init: bool = _key(
        False, "bool", "start from the weights' principal components (16-bit LoRA)",
        "以权重的主成分初始化适配器（16 位 LoRA）",
    )  # fmt: skip
    pissa_iter: int = _key(
        16, "int", "iterations of the fast SVD of pissa_init; -1: the exact SVD",
        "pissa_init 快速 SVD 的迭代次数；-1：精确 SVD", minimum=-1,
    )  # fmt: skip
    loftq_init: bool = _key(
        False, "bool", "start from the quantisation error of the weights (QLoRA)",
        "以 4 位量化的误差初始化适配器（QLoRA）", ours=True,
    )  # fmt: skip
    neftune_noise_alpha: float | None = _key(
        None,
        "float",
        "NEFTune noise on the embeddings, e.g. 5",
        "词嵌入上的 NEFTune 噪声，例如 5",
        minimum=0.0,
    )
    pref_loss: str = _key(
        "sigmoid", "text", "the preference loss of stage dpo", "dpo 阶段的偏好损失", choices=PREFERENCES
    )
    pref_beta: float = _key(
        0.1, "float", "beta of the preference loss: larger stays nearer to the reference model",
        "偏好损失的 beta：越大越接近参考模型", exclusive_minimum=0.0,
    )  # fmt: skip
    pref_ftx: float = _key(
        0.0,
        "float",
        "weight of the plain loss on the chosen answers",
        "优选回答上普通损失的权重",
        minimum=0.0,
    )
    simpo_gamma: float = _key(
        0.5, "float", "margin of pref_loss simpo", "simpo 损失的间隔", exclusive_minimum=0.0
    )
    dpo_label_smoothing: float = _key(
        0.0, "float", "share of wrong labels assumed", "假定标错的偏好所占比例", minimum=0.0, maximum=0.5
    )
    kto_chosen_weight: float = _key(
        1.0, "float", "weight of the good answers in stage kto", "kto 阶段好回答的权重", minimum=0.0
    )
    kto_rejected_weight: float = _key(
        1.0, "float", "weight of the bad answers in stage kto", "kto 阶段坏回答的权重", minimum=0.0
    )
    # Data
    dataset: tuple[str, ...] = _key(
        MISSING, "names", "names in dataset_info.json, separated by commas",
        "dataset_info.json 中的数据集名，用逗号分隔",
    )  # fmt: skip
    eval_dataset: tuple[str, ...] | None = _key(
        None, "names", "data sets to evaluate on; excludes val_size", "用于评估的数据集；不能与 val_size 同用"
    )
    dataset_dir: str = _key(
        "data", "text", "the folder with dataset_info.json", "dataset_info.json 所在的文件夹"
    )
    template: str | None = _key(
        None, "text", "LLaMA-Factory's name of a chat template, for a model without one or in place of its "
        "own; none: the model's own",
        "LLaMA-Factory 的模板名：为没有对话模板的模型提供模板，或替换自带的；不填：用模型自带的",
    )  # fmt: skip
    cutoff_len: int = _key(
        2048, "int", "longest row in tokens; longer ones are cut, and counted",
        "每条数据的最大 token 数；超出的会被截断并计数", minimum=8,
    )  # fmt: skip
    max_samples: int | None = _key(
        None, "int", "at most so many rows of each data set", "每个数据集最多取多少条", minimum=1
    )
    val_size: float = _key(
        0.0, "float", "rows held out: below 1 a fraction, from 1 a count",
        "留作验证的数据：小于 1 为比例，1 及以上为条数", minimum=0.0,
    )  # fmt: skip
    mix_strategy: str = _key(
        "concat", "text", "several data sets: one after the other, or drawn in turn until the first "
        "(under) or the last (over) of them has ended",
        "多个数据集：依次拼接，或轮流抽取，直到最先（under）或最后（over）一个用完", choices=MIXES,
    )  # fmt: skip
    interleave_probs: tuple[float, ...] | None = _key(
        None, "floats", "share of each data set in what is drawn, separated by commas",
        "抽取时各数据集所占比例，用逗号分隔",
    )  # fmt: skip
    packing: bool = _key(
        False, "bool", "several rows in one sequence; they do not see each other. On in stage: pt, where all "
        "texts follow one another",
        "把多条数据放进一个序列，彼此不可见；stage: pt 时默认开启，文本首尾相接",
    )  # fmt: skip
    neat_packing: bool = _key(False, "bool", "the same as packing here", "此处与 packing 相同")
    train_on_prompt: bool = _key(False, "bool", "loss on the questions too", "问题部分也计算损失")
    mask_history: bool = _key(
        False, "bool", "no loss on answers before the last one", "只对最后一轮回答计算损失"
    )
    default_system: str | None = _key(
        None, "text", "system message for rows that have none", "没有系统消息的数据所用的系统消息"
    )
    parse_control_tokens: bool = _key(
        False, "bool", "control tokens in a row's own texts are tokens (serving takes them as plain text)",
        "数据文本中的控制标记按标记处理（服务时则视为普通文本）", ours=True,
    )  # fmt: skip
    enable_thinking: bool | None = _key(
        True, "bool?", "rows without reasoning, true: learn an empty one; false: get it in the prompt; "
        "null: are left alone (only for templates that think)",
        "没有思考过程的数据，true：学习空的思考；false：把空思考放进提示；null：保持原样（仅对会思考的模板）",
    )  # fmt: skip
    tokenized_path: str | None = _key(
        None, "text", "a folder for encoded rows: written where it is empty, else read in place of the data",
        "存放已编码数据的文件夹：为空时写入，否则代替原始数据读取",
    )  # fmt: skip
    strict: bool = _key(
        False,
        "bool",
        "stop at bad rows in place of leaving them out",
        "遇到坏数据就停止，而不是跳过",
        ours=True,
    )
    # Trainer
    output_dir: str = _key(
        MISSING, "text", "the run folder; the adapter goes to output_dir/adapter",
        "运行文件夹；适配器写入 output_dir/adapter",
    )  # fmt: skip
    overwrite_output_dir: bool = _key(
        False,
        "bool",
        "replace what an earlier run made, as --overwrite does",
        "覆盖以前的结果，同 --overwrite",
    )
    per_device_train_batch_size: int = _key(
        8, "int", "rows in one forward pass", "一次前向计算的数据条数", minimum=1
    )
    per_device_eval_batch_size: int = _key(
        8, "int", "rows in one forward pass of validation", "验证时一次前向计算的数据条数", minimum=1
    )
    gradient_accumulation_steps: int = _key(
        1, "int", "forward passes in one optimizer step", "累积多少次前向计算后更新一次", minimum=1
    )
    learning_rate: float = _key(5e-5, "float", "peak learning rate", "最高学习率", exclusive_minimum=0.0)
    num_train_epochs: float = _key(3.0, "float", "passes over the data", "训练轮数", exclusive_minimum=0.0)
    max_steps: int = _key(
        -1,
        "int",
        "stop after so many optimizer steps; -1: by epochs",
        "更新多少步后停止；-1：按轮数",
        minimum=-1,
    )
    lr_scheduler_type: str = _key(
        "linear", "text", "shape of the learning rate", "学习率的变化曲线", choices=SCHEDULES
    )
    warmup_ratio: float = _key(
        0.0, "float", "share of the steps that warm up", "预热步数所占比例", minimum=0.0, maximum=1.0
    )
    warmup_steps: int = _key(
        0, "int", "steps that warm up; wins over warmup_ratio", "预热步数；优先于 warmup_ratio", minimum=0
    )
    max_grad_norm: float = _key(
        1.0, "float", "gradients with a larger norm are scaled down to it; 0: never",
        "梯度范数超过此值时缩小到此值；0：不裁剪", minimum=0.0,
    )  # fmt: skip
    weight_decay: float = _key(0.0, "float", "AdamW's weight decay", "AdamW 的权重衰减", minimum=0.0)
    adam_beta1: float = _key(
        0.9, "float", "decay of AdamW's mean of gradients", "AdamW 梯度均值的衰减率", minimum=0.0,
        exclusive_maximum=1.0,
    )  # fmt: skip
    adam_beta2: float = _key(
        0.999, "float", "decay of AdamW's mean of squared gradients", "AdamW 梯度平方均值的衰减率",
        minimum=0.0, exclusive_maximum=1.0,
    )  # fmt: skip
    adam_epsilon: float = _key(
        1e-8,
        "float",
        "what AdamW adds to the root before it divides",
        "AdamW 除法前加到平方根上的数",
        minimum=0.0,
    )
    deepspeed: str | None = _key(
        None, "text", "DeepSpeed's JSON: ZeRO 0 to 2 sums gradients, ZeRO-3 of a frozen base is fsdp",
        "DeepSpeed 的 JSON：ZeRO 0 至 2 为梯度求和，训练适配器时 ZeRO-3 即 fsdp",
    )  # fmt: skip
    fsdp: str | None = _key(
        None, "text", "shard the frozen weights over processes, for a base that does not fit on one GPU",
        "把冻结的权重分片到多个进程，用于单块 GPU 放不下的模型",
        choices=("full_shard", "full_shard auto_wrap"),
    )  # fmt: skip
    optim: str = _key(
        "adamw_torch", "text", "the optimizer; paged_adamw_8bit needs CUDA",
        "优化器；paged_adamw_8bit 需要 CUDA", choices=OPTIMIZERS,
    )  # fmt: skip
    bf16: bool = _key(False, "bool", "compute in bfloat16", "用 bfloat16 计算")
    fp16: bool = _key(False, "bool", "compute in float16", "用 float16 计算")
    use_cpu: bool = _key(
        False, "bool", "train on the CPU even where there is a GPU", "即使有 GPU 也用 CPU 训练"
    )
    ddp_timeout: int = _key(
        1800, "int", "seconds that a process waits for the others", "进程等待其他进程的秒数", minimum=1
    )
    disable_shuffling: bool = _key(False, "bool", "take the rows in their order", "不打乱数据顺序")
    seed: int = _key(
        42, "int", "seed of shuffling, of the adapter's start and of dropout",
        "打乱数据、初始化适配器和 dropout 的随机种子", minimum=0,
    )  # fmt: skip
    # While it runs
    logging_steps: int = _key(
        5,
        "int",
        "steps between two lines of trainer_log.jsonl",
        "每隔多少步写一行 trainer_log.jsonl",
        minimum=1,
    )
    plot_loss: bool = _key(
        False, "bool", "draw training_loss.svg, the losses as a picture", "画出损失曲线 training_loss.svg"
    )
    report_to: tuple[str, ...] = _key(
        ("none",), "names", "trackers that get the figures too; all: those that are installed",
        "同时上报数据的跟踪工具；all：所有已安装的", names=TRACKERS,
    )  # fmt: skip
    run_name: str | None = _key(
        None, "text", "the run's name in trackers; none: that of output_dir",
        "运行在跟踪工具中的名称；不填：output_dir 的名称",
    )  # fmt: skip
    project: str = _key(
        "huggingface", "text", "the project in wandb and trackio", "wandb 与 trackio 中的项目名"
    )
    use_swanlab: bool = _key(False, "bool", "report to swanlab", "上报到 swanlab")
    swanlab_project: str = _key("llamafactory", "text", "the project in swanlab", "swanlab 中的项目名")
    swanlab_workspace: str | None = _key(None, "text", "the workspace in swanlab", "swanlab 中的工作区")
    swanlab_run_name: str | None = _key(
        None, "text", "the run's name in swanlab; none: run_name", "swanlab 中的运行名；不填：同 run_name"
    )
    swanlab_mode: str = _key(
        "cloud", "text", "where swanlab keeps figures", "swanlab 数据的保存位置", choices=("cloud", "local")
    )
    swanlab_logdir: str | None = _key(None, "text", "the folder of swanlab's logs", "swanlab 日志的文件夹")
    save_strategy: str = _key(
        "steps", "text", "when a checkpoint is written", "何时保存检查点", choices=STRATEGIES
    )
    save_steps: int = _key(500, "int", "steps between two checkpoints", "每隔多少步保存检查点", minimum=1)
    save_total_limit: int | None = _key(
        None, "int", "checkpoints to keep, the best one beside them",
        "最多保留多少个检查点，最好的一个另外保留", minimum=1,
    )  # fmt: skip
    save_only_model: bool = _key(
        False, "bool", "checkpoints without the optimizer: no resuming from them",
        "检查点不含优化器状态：不能从中恢复训练",
    )  # fmt: skip
    resume_from_checkpoint: str | None = _key(
        None, "resume", "true: resume from the last whole checkpoint; or the path of one",
        "true：从最后一个完整的检查点恢复；或某个检查点的路径",
    )  # fmt: skip
    eval_strategy: str = _key(
        "no",
        "text",
        "when to evaluate; at the end in any case",
        "何时评估；结束时总会评估",
        choices=STRATEGIES,
    )
    eval_steps: int | None = _key(
        None, "int", "steps between two evaluations; none: logging_steps",
        "每隔多少步评估；不填：同 logging_steps", minimum=1,
    )  # fmt: skip
    compute_accuracy: bool = _key(
        False, "bool", "evaluations count the tokens that are predicted right too",
        "评估时同时统计预测正确的 token 比例",
    )  # fmt: skip
    eval_answers: int = _key(
        2, "int", "held-out questions to answer at each evaluation", "每次评估时回答几个留出的问题",
        minimum=0, ours=True,
    )  # fmt: skip
    early_stopping_steps: int | None = _key(
        None, "int", "stop after so many evaluations without a better loss; the best is kept",
        "连续多少次评估没有更低的损失就停止；保留最好的权重", minimum=1,
    )  # fmt: skip
    load_best_model_at_end: bool = _key(
        False, "bool", "end with the weights of the best evaluation", "结束时取评估最好的权重"
    )
    ignore_memory: bool = _key(
        False, "bool", "train although the estimate does not fit into memory",
        "即使估计内存不足也继续训练", ours=True,
    )  # fmt: skip
    # Answers
    do_train: bool | None = _key(
        None, "bool?", "false: only what do_predict asks for", "false：只执行 do_predict"
    )
    do_predict: bool = _key(
        False, "bool", "answer the held-out rows (eval_dataset, val_size) and score the answers",
        "对留出的数据（eval_dataset、val_size）生成回答并打分",
    )  # fmt: skip
    max_new_tokens: int = _key(
        1024,
        "int",
        "longest answer of do_predict and edge chat",
        "do_predict 与 edge chat 的最长回答",
        minimum=1,
    )
    do_sample: bool = _key(True, "bool", "sample answers; false: greedy", "采样生成回答；false：贪心")
    temperature: float = _key(0.95, "float", "of sampled answers", "采样温度", minimum=0.0, maximum=2.0)
    top_p: float = _key(
        0.7, "float", "sample from the likeliest tokens that add up to this",
        "从累计概率达到此值的 token 中采样", exclusive_minimum=0.0, maximum=1.0,
    )  # fmt: skip
    top_k: int = _key(
        50, "int", "sample from so many tokens; 0: all", "从前多少个 token 中采样；0：全部", minimum=0
    )
    repetition_penalty: float = _key(
        1.0, "float", "above 1: tokens that were used count less", "大于 1 时降低已出现 token 的概率",
        exclusive_minimum=0.0,
    )  # fmt: skip
    # Export
    export_dir: str | None = _key(
        None, "text", "the folder of the merged model, for edge export CONFIG.yaml",
        "合并后模型的文件夹，用于 edge export CONFIG.yaml",
    )  # fmt: skip
    export_size: int = _key(5, "int", "GB of a file of weights at most", "每个权重文件最多多少 GB", minimum=1)
    infer_dtype: str = _key(
        "auto", "text", "type of the merged weights; auto: float16", "合并后权重的类型；auto：float16",
        choices=("auto", "float16", "bfloat16", "float32"),
    )  # fmt: skip
    # Not a key.
    warnings: tuple[str, ...] = ()

    @property
    def alpha(self) -> int:
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def trains(self) -> bool:
        """Whether it trains, and not only answers (do_predict)."""
        return not self.do_predict if self.do_train is None else self.do_train

    @property
    def grows(self) -> bool:
        """Whether tokens may be added, and the tables of tokens are trained."""
        return self.resize_vocab or bool(self.add_tokens or self.add_special_tokens)

    @property
    def whole(self) -> bool:
        """Whether weights of the model itself are trained, not an adapter."""
        return self.finetuning_type != "lora"

    @property
    def packs(self) -> bool:
        return self.packing or self.neat_packing

    @property
    def keeps_best(self) -> bool:
        return self.load_best_model_at_end or self.early_stopping_steps is not None


def plain(value: Any) -> Any:
    """A value of a TrainConfig as it stands in YAML: several names or numbers as one text with commas."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else value


FIELDS: dict[str, Key] = {
    entry.name: entry.metadata["key"] for entry in fields(TrainConfig) if entry.metadata
}
REQUIRED = tuple(name for name, key in FIELDS.items() if key.default is MISSING)
# The first key of each group, in the table's order.
GROUPS = {
    "model_name_or_path": ("Model", "模型"),
    "stage": ("Method", "方法"),
    "dataset": ("Data", "数据"),
    "output_dir": ("Training", "训练"),
    "logging_steps": ("Logs, checkpoints and evaluations", "日志、检查点与评估"),
    "do_train": ("Answers", "回答"),
    "export_dir": ("Export", "导出"),
}
