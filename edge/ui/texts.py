"""The page's words, in English and Chinese. The English text is the key."""

from __future__ import annotations

LANGUAGES = {"en": "en-US", "zh": "zh-CN"}


class Texts:
    """Translates into one language. Raises KeyError for a text that the table lacks."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, text: str) -> str:
        return CHINESE[text] if self.language == "zh" else text

    def key(self, key: str) -> str:
        """A key of the configuration, behind its name in Chinese."""
        return f"{NAMES[key]} {key}" if self.language == "zh" and key in NAMES else key

    def progress(self, text: str) -> str:
        """A stage of a command, or the unit that it counts in; of a stage that names files they stay."""
        known = next((one for one in PROGRESS if f"{text} ".startswith(f"{one} ")), "")
        return PROGRESS[known] + text[len(known) :] if known and self.language == "zh" else text

    def help(self, key: str) -> str:
        return HELP[key][self.language == "zh"]

    def of(self, about: dict[str, str], key: str) -> str:
        """A text of the JSON Schema, which has both languages."""
        return about[f"x-{key.removeprefix('x-')}-zh"] if self.language == "zh" else about[key]


CHINESE = {
    "Model": "模型", "Data": "数据", "Train": "训练", "Runs": "记录",
    "Export": "导出", "Chat": "对话", "Measure": "评测",
    "Language": "语言", "Light or dark": "浅色或深色",
    # A job
    "Waiting": "排队中", "Running": "运行中", "Stopping": "正在停止", "Done": "完成", "Failed": "失败",
    "Stopped": "已停止", "Lost": "中断", "Stop": "停止", "End at once": "立即结束", "Resume": "继续",
    "Run again": "重新运行", "Log": "日志", "{time} left": "剩余 {time}",
    "{time} so far": "已用 {time}", "took {time}": "用时 {time}",
    "The disk is full: free some space, and run it again.": "磁盘已满：请清理空间后重新运行。",
    "Its process is gone: it was killed, or the machine went down.": "进程已不在：被终止，或机器曾关机。",
    "loss": "损失", "loss, smoothed": "平滑损失", "validation loss": "验证损失", "learning rate": "学习率",
    "gradient norm": "梯度范数", "tokens/s": "词元/秒", "memory": "内存", "Sample answers": "示例回答",
    "The loss is almost zero: the model repeats the rows by heart.": "损失几乎为零：模型在背诵数据。",
    "The loss is flat: try a larger learning rate, or look at the data.":
        "损失没有下降：试试更大的学习率，或检查数据。",
    "The validation loss rises: the model learns the rows by heart. Stop earlier.":
        "验证损失上升：模型开始背诵数据，应更早停止。",
    # Model
    "Hub id, folder or GGUF file": "模型编号、文件夹或 GGUF 文件",
    "Get the model": "获取模型", "Hub": "模型库",
    "No model is here yet.": "这里还没有模型。", "Name a model first.": "请先填写模型。",
    "{name} is embedded and needs no hub; a hub id is ORG/NAME. The hub is {url}; HF_ENDPOINT names another.":
        "{name} 是内置模型，无需联网；模型编号形如 组织/名称。当前模型库为 {url}，可用 HF_ENDPOINT 更换。",
    "fits for serving": "内存足够部署",
    "too large for serving here": "内存不足以部署",
    "fits for serving in 16 bits": "可按 16 位部署", "fits for serving in 8 bits": "可按 8 位部署",
    "fits for serving in 4 bits": "可按 4 位部署", "LoRA fits for training": "内存足够 LoRA 训练",
    "QLoRA fits for training": "内存足够 QLoRA 训练", "too large for training here": "内存不足以训练",
    "By the weights' size and the memory that is free now; a plan counts exactly.":
        "依据权重大小和当前可用内存估计；训练页的预览会精确计算。",
    "Train it": "用它训练",
    "for serving only": "只能部署", "chat template": "有对话模板", "no chat template": "无对话模板",
    # Data
    "Use it": "使用", "Edit rows": "编辑数据",
    "Earlier row": "上一条", "Later row": "下一条", "Row": "条", "Close": "关闭",
    "{name}, row {number}": "{name}，第 {number} 条",
    "This row is no JSON object: mend its text.": "这一条不是 JSON 对象，请修改其文本。",
    "Upload files": "上传文件",
    "json, jsonl, csv or parquet; they are put into the folder.":
        "json、jsonl、csv 或 parquet；文件会放入该文件夹。",
    "No data set yet: upload a file.": "还没有数据集，请上传文件。",
    "Mend": "修复", "Leave it out": "放弃",
    "Which column of {name} is what?": "{name} 的各列分别是什么？",
    "Choose a base model in the Train tab: its tokenizer and template are used.":
        "请先在“训练”页选择基座模型：将使用它的分词器和模板。",
    "{name}: {rows} rows, {trained} to train on, {held} held out, {left} left out":
        "{name}：共 {rows} 条，训练 {trained} 条，验证 {held} 条，剔除 {left} 条",
    "Rows that are left out": "被剔除的数据",
    "{tokens} tokens in an epoch, {learnt} of them with loss; {cut} rows are cut":
        "每轮 {tokens} 个词元，其中 {learnt} 个计算损失；{cut} 条被截断",
    "tokens in a row": "每条的词元数",
    "The exact tokens; those with loss are coloured.":
        "逐个词元；有颜色的计算损失。",
    # Runs
    "No training yet.": "还没有训练。", "Jobs": "任务", "Continue from": "接着训练",
    "From a checkpoint": "从检查点继续",
    "Delete": "删除", "Keep": "保留",
    "What differs": "不同之处", "Settings and figures": "设置与结果",
    "To delete {name} with all its checkpoints and exports, type its name.":
        "要删除 {name} 及其所有检查点和导出，请输入它的名称。",
    "That is not its name; nothing was deleted.": "名称不符，未删除任何内容。",
    "Take home": "下载带走",
    "One file each; unpacked in runs/ it is the run again: tar -xf FILE -C runs":
        "各为一个文件；在 runs/ 中解开即恢复该次训练：tar -xf 文件 -C runs",
    "The command goes on where a download broke off; where the page has a key, add -u :KEY.":
        "该命令会从中断处继续下载；若页面设有密钥，请加上 -u :密钥。",
    # Export
    "Run": "运行",
    "No run with a result yet: train first.": "还没有训练结果，请先训练。",
    "by size": "按模型大小",
    "measure several here": "在本机测量多种", "Export GGUF": "导出 GGUF", "Export ONNX": "导出 ONNX",
    "Merge": "合并",
    "Export LoRA": "导出 LoRA", "For Ollama": "用于 Ollama", "Export GGUF first.": "请先导出 GGUF。",
    "compared with {stage}": "与 {stage} 的对比", "result": "结果", "what it means": "含义",
    "the same": "相同", "different": "不同",
    "Chat template": "对话模板",
    "The model is shown a conversation in the form that it was trained on.": "对话以训练时的格式送入模型。",
    "Token ids": "词元编号", "A text becomes the same numbers.": "同样的文字变成同样的编号。",
    "Text to ids and back": "文字与编号互转", "No character is lost on the way.": "转换中不丢字符。",
    "Stop tokens": "停止词元", "An answer ends where it should.": "回答会在该结束处结束。",
    "Most likely next token": "最可能的下一个词元",
    "How often both would go on with the same token.": "两者选出同一个词元的比例。",
    "Tokens of whole answers": "整段回答的词元",
    "How many are the same when both answer without chance.": "两者都不随机作答时，相同的词元数。",
    "KL divergence, mean": "平均 KL 散度",
    "How far all probabilities have moved: 0 is not at all, four bits are usually below 0.1.":
        "全部概率的偏移程度：0 为毫无偏移，4 位通常低于 0.1。",
    "Perplexity": "困惑度",
    "How surprised the model is by the answers of the data set: nearly equal is good.":
        "模型对数据集中的回答有多意外：前后接近就好。",
    "type": "类型", "size": "大小", "recommended": "推荐",
    "Port": "端口", "A port is a number from 1 to 65535.": "端口是 1 到 65535 的数字。",
    "Serve it": "启动服务",
    "GGUF is what a laptop runs: here, in Ollama and in LM Studio. What an export needs is merged first.":
        "笔记本上通常用 GGUF：可用于本页、Ollama 和 LM Studio。导出前会自动完成所需的合并。",
    "What is exported as GGUF or ONNX can be served here.": "导出为 GGUF 或 ONNX 后，可在此启动服务。",
    "API key, empty for none": "API 密钥（留空则不需要）", "Hello!": "你好！",
    "A key has ASCII letters, digits and signs, and no spaces.": "密钥只含英文字母、数字和符号，不含空格。",
    "Stop serving": "停止服务",
    # Chat
    "Nothing to talk to yet: get a model in the Model tab.": "还没有可对话的模型，请先在“模型”页获取。",
    "Model A": "模型 A", "Model B, or the same for two answers": "模型 B（选同一个则得到两个回答）",
    "is being loaded": "正在加载", "Unload": "卸载", "Question": "问题", "Send": "发送",
    "New chat": "新对话", "Save as JSON": "存为 JSON", "System prompt": "系统提示词",
    "System prompt and sampling": "系统提示词与采样", "Temperature": "温度", "Tokens at most": "最多词元数",
    "Reasoning": "思考过程", "A is better": "A 更好", "B is better": "B 更好", "Regenerate": "重新生成",
    "A good answer": "回答好", "A bad answer": "回答不好", "Copy": "复制",
    "Answer a file": "回答文件",
    "json, jsonl or csv as for training, or txt with a question a line; model A and B answer all.":
        "json、jsonl 或 csv（与训练数据相同），或每行一个问题的 txt；模型 A 和 B 都会回答。",
    "Download the answers": "下载回答", "Answer": "回答", "hoped for": "参考回答",
    "Edit": "编辑", "Ask again": "重新提问",
    "Train DPO on choices ({count})": "用选择训练 DPO（{count}）",
    "Train KTO on thumbs ({count})": "用评价训练 KTO（{count}）",
    # Measure
    "Measure the speed": "测速度", "In a minute or two": "一两分钟内完成", "Evaluate": "评估",
    "Speed is measured beside the slow baseline; evaluating scores answers to the held-out rows.":
        "速度与慢速基线对比测量。评估会回答留出的数据并打分。",
    "figure": "指标", "value": "数值", "This machine": "本机", "part": "部分", "name": "名称",
    "what is there": "现状", "what to do": "要做什么",
    # Train
    "Models that are loaded hold memory: unload them, and start again.":
        "已加载的模型占用内存：请卸载后重新开始。",
    "Steps, memory and time are being worked out …": "正在计算步数、内存与时间……",
    "How long it takes is not known: no training of this kind has ended here yet.":
        "所需时间未知：本机还没有完成过同类训练。",
    "About {time}, by the {speed} tokens/s of: {source}. Evaluations and checkpoints come on top.":
        "约需 {time}，依据 {source} 的 {speed} 词元/秒；评估与保存检查点另计。",
    "steps just tried": "刚试跑的几步", "Try a few steps": "试跑几步",
    "{rows} rows, {held} held out, {steps} steps on {device}; {memory} of memory, {free} are free":
        "训练 {rows} 条，验证 {held} 条，在 {device} 上共 {steps} 步；需要内存 {memory}，可用 {free}",
    "Name of the run": "运行名称",
    "Letters, digits, dots, dashes and underscores; the folder is runs/NAME.":
        "字母、数字、点、短横线和下划线；文件夹为 runs/名称。",
    "A run's name begins with a letter or digit; dots, dashes and underscores may follow.":
        "运行名称以字母或数字开头，其后可用点、短横线和下划线。",
    "Preset": "预设", "LoRA, 16 bits": "LoRA，16 位", "QLoRA, 4 bits": "QLoRA，4 位",
    "All weights": "全参数", "DPO on preferences": "偏好 DPO",
    "Folder of the data sets": "数据集文件夹",
    "Goes on from {name}: learning rate, schedule and length may change, nothing else.":
        "从 {name} 接着训练：学习率、调度和训练长度可以改，其余设置保持不变。",
    "Begin anew instead": "改为从头训练",
    "Base model": "基座模型", "Data sets": "数据集",
    "computation type": "计算类型", "automatic": "自动",
    "More settings": "更多设置", "Replace an earlier result": "覆盖之前的结果",
    "Start training": "开始训练", "Preview": "预览", "Command": "命令", "Configuration": "配置",
    "Save": "保存", "Load a configuration": "载入配置",
    "A YAML file, LLaMA-Factory's too.": "YAML 文件，也可以是 LLaMA-Factory 的。",
    "{name} was read.": "已读取 {name}。", "Saved as {name}.": "已保存为 {name}。",
    "Default: {value}": "默认：{value}",
    "Choose a base model and at least one data set.": "请选择基座模型和至少一个数据集。",
}  # fmt: skip

# How commands begin what they say of their progress, and their units.
PROGRESS = {
    "training": "训练", "evaluating": "验证", "planning": "规划", "reading the data": "读取数据",
    "loading the model": "加载模型", "answering": "回答问题", "loading": "加载", "ready": "就绪",
    "downloading": "下载", "getting": "获取", "converting": "转换", "building": "构建",
    "merging into": "合并到", "quantising to": "量化为", "comparing logits:": "比较概率：",
    "computing the merged model": "计算合并后的模型", "gathering the importance matrix": "收集重要性矩阵",
    "measuring what": "测量", "smoothing the activations of": "平滑激活值：",
    "steps": "步", "tensors": "个张量", "layers": "层", "texts": "段文字", "batches of answers": "批回答",
    "questions": "个问题",
}  # fmt: skip

# The keys that beginners are taught, in that order, as Chinese calls them.
NAMES = {
    "learning_rate": "学习率",
    "num_train_epochs": "训练轮数",
    "max_grad_norm": "最大梯度范数",
    "max_samples": "最大样本数",
    "cutoff_len": "截断长度",
    "per_device_train_batch_size": "批处理大小",
    "gradient_accumulation_steps": "梯度累积",
    "val_size": "验证集比例",
    "lr_scheduler_type": "学习率调节器",
    "lora_rank": "LoRA 秩",
    "quantization_bit": "量化位数",
    "adapter_name_or_path": "已有适配器",
    "create_new_adapter": "新建适配器",
}

# What each means, in two sentences.
HELP: dict[str, tuple[str, str]] = {
    "learning_rate": (
        "How far each step moves the weights. Too large and the loss jumps, too small and nothing is "
        "learnt; LoRA likes 1e-4 to 5e-4.",
        "每一步改变权重的幅度。太大损失会跳动，太小学不到东西；LoRA 常用 1e-4 到 5e-4。",
    ),
    "num_train_epochs": (
        "How often all rows are gone through. Few rows need more passes, and too many make the model "
        "repeat them.",
        "所有数据训练几遍。数据少时需要多几遍，太多则会背诵。",
    ),
    "max_grad_norm": (
        "A gradient longer than this is shortened to it. It keeps one odd row from spoiling the weights; "
        "1 is usual.",
        "梯度超过该值时被缩短。可避免个别异常数据破坏权重，通常为 1。",
    ),
    "max_samples": (
        "At most so many rows of each data set. A small number shows quickly whether everything works.",
        "每个数据集最多使用的条数。先用小数目可以很快看出是否一切正常。",
    ),
    "compute": (
        "The numbers that are calculated with. bf16 suits newer GPUs, fp16 older ones; automatic chooses "
        "for this machine.",
        "计算所用的数值类型。较新的显卡用 bf16，较旧的用 fp16；自动则按本机选择。",
    ),
    "cutoff_len": (
        "Longer rows are cut to so many tokens. Memory grows with it: take what most of your rows need.",
        "更长的数据会被截断到这么多词元。它越大占用内存越多，够大多数数据用即可。",
    ),
    "per_device_train_batch_size": (
        "Rows that are calculated at once. More is faster and needs more memory.",
        "一次同时计算的条数。越大越快，占用内存也越多。",
    ),
    "gradient_accumulation_steps": (
        "So many batches make one step. It acts like a larger batch without its memory.",
        "累积多少个批次更新一次。效果如同更大的批次，而不多占内存。",
    ),
    "val_size": (
        "Rows kept out to test on: below 1 a share, from 1 on a count. Their loss shows whether it learns "
        "or repeats.",
        "留作验证的数据：小于 1 是比例，1 以上是条数。验证损失能看出模型是在学习还是背诵。",
    ),
    "lr_scheduler_type": (
        "How the learning rate changes over time. cosine begins fast and ends gently, and suits most "
        "trainings.",
        "学习率随时间的变化。cosine 先快后缓，适合大多数训练。",
    ),
    "lora_rank": (
        "The size of the adapter. 8 to 16 is enough for a style or a persona, more for new knowledge.",
        "适配器的大小。学习风格或人设 8 到 16 足够，学习新知识可更大。",
    ),
    "quantization_bit": (
        "4 trains over weights of 4 bits (QLoRA) in a quarter of the memory. Empty takes 16 bits.",
        "填 4 则在 4 位权重上训练（QLoRA），内存只需约四分之一。留空为 16 位。",
    ),
    "adapter_name_or_path": (
        "An earlier run to go on from. Empty begins a new adapter.",
        "从之前的训练接着训练。留空则新建适配器。",
    ),
    "create_new_adapter": (
        "On: the earlier adapter is merged and a new one put on top. Off: the earlier one is trained on.",
        "开启：合并之前的适配器并在其上新建。关闭：继续训练之前的适配器。",
    ),
}
