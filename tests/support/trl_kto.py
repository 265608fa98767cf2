"""The loss and gradients that trl's KTOTrainer computes for one batch. Run as a program.

It reads {"base", "before", "after", "out": folders; "rows": [{"prompt", "completion", "label"}]; "beta",
"weights"} from stdin: adapters before and after some training, the first of which is the reference. It
prints the loss, and writes the gradients to the folder `out`. trl lies in .peers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    asked = json.loads(sys.stdin.read())
    out, sys.stdout = sys.stdout, sys.stderr
    sys.path.append(str(Path(__file__).parents[2] / ".peers"))
    from datasets import Dataset
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    base = AutoModelForCausalLM.from_pretrained(asked["base"])
    model = PeftModel.from_pretrained(base, asked["before"], is_trainable=True)
    good, bad = asked["weights"]
    config = KTOConfig(
        output_dir=asked["out"], per_device_train_batch_size=len(asked["rows"]), beta=asked["beta"],
        desirable_weight=good, undesirable_weight=bad, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, max_length=256,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(asked["base"])
    trainer = KTOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(asked["rows"]), processing_class=tokenizer
    )
    set_peft_model_state_dict(model, load_file(Path(asked["after"]) / "adapter_model.safetensors"))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name.replace(".default", ""): one.grad
        for name, one in model.named_parameters()
        if one.grad is not None and ".default" in name
    }
    save_file(gradients, Path(asked["out"]) / "gradients.safetensors")
    json.dump({"loss": float(loss)}, out)


if __name__ == "__main__":
    main()
