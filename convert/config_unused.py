"""Keys of LLaMA-Factory and transformers that this project does not honour: taken without effect, or refused.

Each says why, in English and Chinese, and where there is one the nearest thing that is honoured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unused:
    """A key that changes nothing here. values: the only ones accepted beside null; None: any.

    reason: why others are refused, or the key has no effect. warn: whether to say so.
    """

    values: tuple[Any, ...] | None
    reason: str
    reason_zh: str
    warn: bool = False

    def takes(self, value: Any) -> bool:
        """Whether `value` is one of `values`: 0 for 0.0, but not for false."""
        return value is None or any(
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in self.values or ()
        )


def _taken(reason: str, reason_zh: str, names: str, *, warn: bool = False) -> dict[str, Unused]:
    """Keys, with blanks between them, that may have any value."""
    return dict.fromkeys(names.split(), Unused(None, reason, reason_zh, warn))


def _refused(values: tuple[Any, ...], reason: str, reason_zh: str, names: str) -> dict[str, Unused]:
    """Keys, with blanks between them, that may have no other value than `values`."""
    return dict.fromkeys(names.split(), Unused(values, reason, reason_zh))


UNUSED: dict[str, Unused] = {
    # Model
    **_refused(
        (), "give the adapter's own folder as adapter_name_or_path",
        "请直接把适配器所在的文件夹填入 adapter_name_or_path",
        "adapter_folder"
    ),
    **_taken(
        "models are loaded with transformers' own classes, code from a repository is never run",
        "只用 transformers 自带的类加载模型，从不运行仓库中的代码",
        "trust_remote_code",
        warn=True
    ),
    **_refused(
        (True,), "only fast tokenizers are read",
        "只读取快速分词器",
        "use_fast_tokenizer"
    ),
    **_refused(
        (), "name the tokens: add_special_tokens", "请用 add_special_tokens 列出 token",
        "new_special_tokens_config"
    ),
    **_taken(
        "belongs to new_special_tokens_config, which is refused",
        "属于 new_special_tokens_config，而后者不受支持",
        "init_special_tokens"
    ),
    **_refused(
        (False,), "text is encoded in training as it is in serving",
        "训练时的编码方式与推理时相同",
        "split_special_tokens"
    ),
    **_taken(
        "it is always so here",
        "此处总是如此",
        "low_cpu_mem_usage use_kv_cache include_num_input_tokens_seen "
        "include_effective_tokens_per_second average_tokens_across_devices pissa_convert "
        "upcast_lmhead_output use_cache"
    ),
    **_refused(
        (False,), "rows attend to everything before them; lower cutoff_len to save memory",
        "每条数据关注其之前的全部内容；要省内存请减小 cutoff_len",
        "shift_attn"
    ),
    **_refused(
        (), "models are trained as they are built",
        "模型结构保持不变",
        "mixture_of_depths"
    ),
    **_taken(
        "training runs on this project's own CUDA kernels",
        "训练使用本项目自己的 CUDA 内核",
        "use_unsloth use_v1_kernels torch_compile",
        warn=True
    ),
    **_taken(
        "activations are recomputed by torch's own gradient checkpointing",
        "激活值由 torch 自带的梯度检查点重新计算",
        "use_unsloth_gc",
        warn=True
    ),
    **_taken(
        "gradients are the same either way",
        "两种方式的梯度相同",
        "use_reentrant_gc"
    ),
    **_refused(
        (), "no loss of a router is added",
        "不加入路由器的损失",
        "moe_aux_loss_coef"
    ),
    **_taken(
        "norms compute in float32 already",
        "归一化层本来就以 float32 计算",
        "upcast_layernorm"
    ),
    **_refused(
        (False,), "training starts from the base's weights",
        "训练从基座模型的权重开始",
        "train_from_scratch"
    ),
    **_taken(
        "`edge chat` and `edge serve` run on this project's own engine",
        "`edge chat` 与 `edge serve` 使用本项目自己的引擎",
        "infer_backend",
        warn=True
    ),
    **_taken(
        "nothing is moved to the disk",
        "不会把权重移到磁盘",
        "offload_folder"
    ),
    **_taken(
        "a setting of another engine",
        "其他推理引擎的设置",
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend"
    ),
    **_refused(
        (), "a run records its configuration, and a token is a secret: set HF_TOKEN, or `hf auth login`",
        "运行会记录全部配置，而令牌是机密：请设置 HF_TOKEN，或用 `hf auth login` 登录",
        "hf_hub_token hub_token"
    ),
    **_refused(
        (), "a run records its configuration, and a token is a secret: set MODELSCOPE_API_TOKEN",
        "运行会记录全部配置，而令牌是机密：请设置 MODELSCOPE_API_TOKEN",
        "ms_hub_token"
    ),
    **_refused(
        (), "models come from the Hugging Face hub or a folder",
        "模型来自 Hugging Face 或本地文件夹",
        "om_hub_token"
    ),
    **_taken(
        "for debugging of LLaMA-Factory itself",
        "仅用于调试 LLaMA-Factory 本身",
        "print_param_status"
    ),
    **_refused(
        ("bnb", "bitsandbytes"), "weights are quantised by bitsandbytes",
        "权重由 bitsandbytes 量化",
        "quantization_method"
    ),
    **_refused(
        ("nf4",), "4-bit weights are NF4, which loses less than FP4",
        "4 位权重为 NF4，损失小于 FP4",
        "quantization_type"
    ),
    **_refused(
        (), "a model is quantised on the device that trains it",
        "模型在训练它的设备上量化",
        "quantization_device_map"
    ),
    **_taken(
        "only text is trained on",
        "只训练文本",
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir "
        "freeze_vision_tower freeze_multi_modal_projector",
        warn=True
    ),
    **_refused(
        (False,), "only text is trained on: nothing would be left to train",
        "只训练文本：冻结后没有可训练的部分",
        "freeze_language_model"
    ),
    **_refused(
        (False,), "`edge train` has no expert layers on the CPU",
        "`edge train` 不支持在 CPU 上训练专家层",
        "use_kt"
    ),
    **_taken(
        "belongs to use_kt, which is refused",
        "属于 use_kt，而后者不受支持",
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size"
    ),
    # Export
    **_taken(
        "merging goes a few rows at a time, on the CPU",
        "合并在 CPU 上逐行进行",
        "export_device"
    ),
    **_refused(
        (), "`edge export gguf RUN --gptq` quantises a merged model",
        "用 `edge export gguf RUN --gptq` 量化合并后的模型",
        "export_quantization_bit"
    ),
    **_taken(
        "belongs to export_quantization_bit, which is refused",
        "属于 export_quantization_bit，而后者不受支持",
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen"
    ),
    **_refused(
        (False,), "no pickle is written",
        "不写 pickle 文件",
        "export_legacy_format"
    ),
    **_refused(
        (), "nothing is uploaded: `hf upload NAME FOLDER` does it",
        "不上传任何内容：请用 `hf upload NAME FOLDER`",
        "export_hub_model_id hub_model_id"
    ),
    **_refused(
        (False,), "nothing is uploaded: `hf upload NAME FOLDER` does it",
        "不上传任何内容：请用 `hf upload NAME FOLDER`",
        "push_to_hub"
    ),
    **_taken(
        "nothing is uploaded",
        "不上传任何内容",
        "hub_strategy hub_private_repo hub_always_push hub_revision"
    ),
    # Method
    **_taken(
        "embeddings get no adapter",
        "词嵌入不加适配器",
        "loraplus_lr_embedding"
    ),
    **_taken(
        "belongs to finetuning_type: oft, which is refused",
        "属于 finetuning_type: oft，而后者不受支持",
        "oft_rank oft_block_size oft_target module_dropout"
    ),
    **_refused(
        (0,), "stage: dpo has no classifier beside its loss",
        "dpo 阶段没有附加的分类器损失",
        "pref_bco_weight"
    ),
    **_refused(
        (), "answers count alike, whatever their length; pref_loss: simpo divides by it",
        "回答不论长短同等对待；pref_loss: simpo 会按长度平均",
        "ld_alpha"
    ),
    **_refused(
        (), "the reference is the model as training begins",
        "参考模型就是训练开始时的模型",
        "ref_model ref_model_adapters ref_model_quantization_bit"
    ),
    **_taken(
        "belongs to stage: ppo, which is refused",
        "属于 ppo 阶段，而后者不受支持",
        "reward_model reward_model_adapters reward_model_quantization_bit reward_model_type "
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards"
    ),
    **_refused(
        (False,), "GaLore trains all weights in little memory; nearest: finetuning_type: lora",
        "GaLore 用于节省全参训练的内存；相近的是 finetuning_type: lora",
        "use_galore"
    ),
    **_refused(
        (False,), "APOLLO trains all weights in little memory; nearest: finetuning_type: lora",
        "APOLLO 用于节省全参训练的内存；相近的是 finetuning_type: lora",
        "use_apollo"
    ),
    **_refused(
        (False,), "BAdam trains all weights in little memory; nearest: finetuning_type: lora",
        "BAdam 用于节省全参训练的内存；相近的是 finetuning_type: lora",
        "use_badam"
    ),
    **_taken(
        "belongs to use_galore, which is refused",
        "属于 use_galore，而后者不受支持",
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
        "galore_layerwise"
    ),
    **_taken(
        "belongs to use_apollo, which is refused",
        "属于 use_apollo，而后者不受支持",
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front"
    ),
    **_taken(
        "belongs to use_badam, which is refused",
        "属于 use_badam，而后者不受支持",
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose"
    ),
    **_refused(
        (False,), "the optimizers are AdamW's: optim: adamw_torch, or paged_adamw_8bit",
        "优化器为 AdamW：optim: adamw_torch 或 paged_adamw_8bit",
        "use_adam_mini use_muon"
    ),
    **_refused(
        (False,), "no layers are added: finetuning_type: lora trains beside what is there",
        "不增加新的层：finetuning_type: lora 在已有的层旁训练",
        "use_llama_pro"
    ),
    **_refused(
        (False,), "several processes are started by torchrun, weights sharded by fsdp",
        "多进程由 torchrun 启动，权重由 fsdp 分片",
        "use_mca use_hyper_parallel"
    ),
    **_taken(
        "belongs to use_hyper_parallel, which is refused",
        "属于 use_hyper_parallel，而后者不受支持",
        "hyper_parallel_args"
    ),
    **_refused(
        (False,), "stage: sft has the plain loss of the next token",
        "sft 阶段使用普通的下一个 token 损失",
        "use_dft_loss use_asft_loss use_eaft_loss"
    ),
    **_taken(
        "belongs to a loss that is refused",
        "属于不受支持的损失",
        "asft_alpha eaft_alpha"
    ),
    # Data
    **_taken(
        "rows are encoded as a whole before training begins: 100,000 take 20 s and 215 MiB",
        "数据在训练开始前全部编码：10 万条约需 20 秒、215 MiB",
        "streaming",
        warn=True
    ),
    **_taken(
        "rows are encoded before training begins",
        "数据在训练开始前已全部编码",
        "buffer_size preprocessing_batch_size preprocessing_num_workers overwrite_cache "
        "data_shared_file_system dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names "
        "length_column_name"
    ),
    **_taken(
        "shuffled rows are batched by length",
        "打乱后的数据按长度分批",
        "train_sampling_strategy group_by_length sortish_sampler"
    ),
    **_refused(
        (False,), "the last batch of an epoch is trained on",
        "每轮的最后一批也会训练",
        "dataloader_drop_last"
    ),
    **_refused(
        (True,), "padding is never learnt",
        "从不学习填充",
        "ignore_pad_token_for_loss"
    ),
    **_refused(
        (), "the model's own chat template writes tools",
        "工具由模型自带的对话模板书写",
        "tool_format"
    ),
    **_refused(
        (False,), "the model's own chat template decides what stays of earlier turns",
        "历史轮次保留什么由模型自带的对话模板决定",
        "preserve_thinking"
    ),
    **_refused(
        (False,), "one loss over all of them; `edge eval RUN --dataset NAME` takes one",
        "所有数据集合计一个损失；用 `edge eval RUN --dataset NAME` 评估其中一个",
        "eval_on_each_dataset"
    ),
    # Training
    **_refused(
        (), "figures are reported, nothing is sent to a chat", "只上报数据，不发送到聊天群",
        "swanlab_lark_webhook_url swanlab_lark_secret"
    ),
    **_refused(
        (), "a run records its configuration, and a key is a secret: set SWANLAB_API_KEY",
        "运行会记录全部配置，而密钥是机密：请设置 SWANLAB_API_KEY",
        "swanlab_api_key"
    ),
    **_taken(
        "val_size or eval_dataset decides it",
        "由 val_size 或 eval_dataset 决定",
        "do_eval"
    ),
    **_refused(
        (True,), "disable_gradient_checkpointing: true turns it off",
        "关闭请用 disable_gradient_checkpointing: true",
        "gradient_checkpointing activation_checkpointing"
    ),
    **_taken(
        "gradients are the same either way",
        "两种方式的梯度相同",
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
    **_refused(
        (False,), "enable_liger_kernel is the key",
        "请使用 enable_liger_kernel",
        "use_liger_kernel"
    ),
    **_refused(
        (), "enable_liger_kernel: true takes norms, rotary embeddings and gates",
        "enable_liger_kernel: true 使用其归一化、旋转位置编码与门控",
        "liger_kernel_config"
    ),
    **_refused(
        (), "optim has no more settings than the table's",
        "optim 没有其他设置",
        "optim_args optim_target_modules"
    ),
    **_refused(
        (), "the schedules of lr_scheduler_type take no more settings",
        "lr_scheduler_type 没有其他设置",
        "lr_scheduler_kwargs"
    ),
    **_refused(
        (0,), "the target token alone is learnt",
        "只学习目标 token",
        "label_smoothing_factor"
    ),
    **_taken(
        "evaluations compute in the type of training",
        "评估使用训练时的数值类型",
        "bf16_full_eval fp16_full_eval"
    ),
    **_taken(
        "products of float32 are computed as torch does by default",
        "float32 乘法按 torch 的默认方式计算",
        "tf32 torch_compile_backend torch_compile_mode torch_empty_cache_steps"
    ),
    **_refused(
        (False,), "memory is counted before training; lower per_device_train_batch_size where it says so",
        "训练前会估计内存；请按提示减小 per_device_train_batch_size",
        "auto_find_batch_size"
    ),
    **_refused(
        (), "several processes are set up by torchrun",
        "多进程由 torchrun 设置",
        "accelerator_config parallelism_config"
    ),
    **_refused(
        (), "fsdp: full_shard needs no more settings",
        "fsdp: full_shard 不需要其他设置",
        "fsdp_config"
    ),
    **_taken(
        "gradients are summed without torch's DDP",
        "不用 torch 的 DDP，梯度直接求和",
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend"
    ),
    **_taken(
        "torchrun's variables say it",
        "由 torchrun 的环境变量给出",
        "local_rank master_addr master_port"
    ),
    **_taken(
        "several processes are started by torchrun",
        "多进程由 torchrun 启动",
        "ray_num_workers ray_init_kwargs",
        warn=True
    ),
    **_taken(
        "runs on a CPU repeat to the bit; kernels of a GPU may differ in the last ones",
        "CPU 上的结果逐位可重复；GPU 内核可能在末位有差异",
        "full_determinism",
        warn=True
    ),
    **_refused(
        (), "seed shuffles the rows",
        "数据由 seed 打乱",
        "data_seed"
    ),
    **_refused(
        (False,), "adapters and weights are computed in 16 or 32 bits",
        "以 16 或 32 位计算",
        "fp8 fp8_enable_fsdp_float8_all_gather"
    ),
    **_taken(
        "belongs to fp8, which is refused",
        "属于 fp8，而后者不受支持",
        "fp8_backend"
    ),
    **_refused(
        (False,), "profile with torch's own tools: `edge bench train` measures the speed",
        "请用 torch 自带的工具分析；`edge bench train` 测量速度",
        "enable_torch_profiler"
    ),
    **_taken(
        "belongs to enable_torch_profiler, which is refused",
        "属于 enable_torch_profiler，而后者不受支持",
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
        "profile_modules"
    ),
    # Logs, checkpoints, evaluations and answers
    **_refused(
        ("steps",), "logging_steps says when",
        "由 logging_steps 决定",
        "logging_strategy"
    ),
    **_taken(
        "lines are written each logging_steps, by the first process",
        "由第一个进程每隔 logging_steps 写一行",
        "logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica "
        "disable_tqdm skip_memory_metrics"
    ),
    **_taken(
        "logs go to output_dir",
        "日志写入 output_dir",
        "logging_dir"
    ),
    **_refused(
        (), "trackio keeps its figures on this machine",
        "trackio 的数据保存在本机",
        "trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    **_refused(
        ("",), "a loss or gradient that is NaN stops the run anyway",
        "出现 NaN 时运行总会停止",
        "debug"
    ),
    **_refused(
        (0,), "eval_steps says when",
        "由 eval_steps 决定",
        "eval_delay"
    ),
    **_refused(
        (False,), "the first evaluation comes after eval_steps",
        "首次评估在 eval_steps 之后",
        "eval_on_start"
    ),
    **_taken(
        "the loss is all that is gathered",
        "只汇总损失",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics"
    ),
    **_refused(
        ("loss", "eval_loss"), "the best evaluation is the one with the lowest loss",
        "损失最低的评估为最佳",
        "metric_for_best_model"
    ),
    **_refused(
        (False,), "the best evaluation is the one with the lowest loss",
        "损失最低的评估为最佳",
        "greater_is_better"
    ),
    **_refused(
        (False,), "a resumed run goes on where it stopped",
        "恢复的运行从停止处继续",
        "ignore_data_skip"
    ),
    **_taken(
        "checkpoints hold all that a run needs, and Ctrl-C writes one",
        "检查点包含恢复所需的一切，Ctrl-C 也会保存",
        "save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint"
    ),
    **_refused(
        (True,), "no pickle is written",
        "不写 pickle 文件",
        "save_safetensors"
    ),
    **_taken(
        "do_predict generates answers",
        "do_predict 会生成回答",
        "predict_with_generate"
    ),
    **_refused(
        (1,), "answers are sampled or greedy, without beams",
        "回答为采样或贪心，不用束搜索",
        "num_beams eval_num_beams generation_num_beams"
    ),
    **_taken(
        "belongs to num_beams, which is refused",
        "属于 num_beams，而后者不受支持",
        "length_penalty"
    ),
    **_taken(
        "max_new_tokens says how long an answer may be",
        "回答的长度由 max_new_tokens 决定",
        "max_length generation_max_length"
    ),
    **_refused(
        (), "temperature, top_p, top_k and repetition_penalty are keys of their own",
        "请直接使用 temperature、top_p、top_k 与 repetition_penalty",
        "generation_config"
    ),
    **_refused(
        (True,), "answers are text without special tokens",
        "回答不含特殊 token",
        "skip_special_tokens"
    ),
    **_refused(
        (), "LLaMA-Factory's eval has ended too: `edge eval RUN` scores answers",
        "LLaMA-Factory 的 eval 也已停用：用 `edge eval RUN` 为回答打分",
        "task"
    ),
    **_taken(
        "belongs to task, which is refused",
        "属于 task，而后者不受支持",
        "task_dir lang n_shot save_dir download_mode"
    ),
    **_taken(
        "it is one of task's; per_device_train_batch_size is that of training",
        "它属于 task；训练的批大小是 per_device_train_batch_size",
        "batch_size",
        warn=True
    ),
}  # fmt: skip
