"""The choices of `edge export onnx`, apart from the export itself, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass

from edge.errors import UsageError

PRECISIONS = ("int4", "int8", "fp16", "fp32")
# How 4-bit weights are chosen: by blocks of 32, by llama.cpp's k-quant search, and that with the most
# sensitive matrices in 8 bits.
SCHEMES = {
    "block": {"algo_config": "rtn"},
    "k-quant": {"algo_config": "k_quant"},
    "mixed": {"algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
}
EPS = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is built. Raises UsageError for a combination that is not known, or that no device computes."""

    precision: str
    scheme: str = "mixed"
    ep: str = "cpu"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--precision", self.precision, PRECISIONS),
            ("--scheme", self.scheme, tuple(SCHEMES)),
            ("--ep", self.ep, EPS),
        ):
            if value not in choices:
                raise UsageError(f"{option} {value}: not known", f"one of {', '.join(choices)}")
        if (self.precision, self.ep) == ("fp32", "cuda"):
            raise UsageError(
                "--precision fp32 --ep cuda: a GPU's attention computes in fp16", "take --precision fp16"
            )
        if (self.precision, self.ep) == ("fp16", "cpu"):
            raise UsageError(
                "--precision fp16: processors compute in fp32", "add --ep cuda, or take --precision fp32"
            )
