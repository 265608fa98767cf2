"""`edge export FORMAT RUN`: the merged model of a run as an artefact that a backend serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convert.export import deploy as deploy_targets
from convert.export import gguf_split, llamacpp_tools, onnx_options
from convert.model.hf_folder import shell
from edge.errors import UsageError
from edge.progress import add_progress_option, result


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    # Each imports its format's modules itself: they take seconds, and a wrong option is refused before.
    formats = {"gguf": _gguf, "lora": _lora, "ollama": _ollama, "onnx": _onnx, "deploy": _deploy}
    formats[options.format](options)
    return 0


def _parser() -> argparse.ArgumentParser:
    replace = argparse.ArgumentParser(add_help=False)
    add_progress_option(replace)
    replace.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    merged = argparse.ArgumentParser(add_help=False, parents=[replace])
    merged.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    parser = argparse.ArgumentParser(prog="edge export", description=__doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")

    gguf = formats.add_parser("gguf", help="RUN/merged -> RUN/gguf, for llama.cpp", parents=[merged])
    default = f"{llamacpp_tools.DEFAULT}, {llamacpp_tools.DEFAULT_SMALL} below a billion parameters"
    gguf.add_argument("--quant", help=f"one of {', '.join(llamacpp_tools.QUANTS)} (default: {default})")
    for option, text in (
        ("--ladder", "measure several types here, export the one that fits best"),
        ("--imatrix", "weigh by the data set's activations, where that is closer"),
        ("--gptq", "round so that weights make up for one another on the data set"),
    ):
        gguf.add_argument(option, action="store_true", help=text)
    gguf.add_argument("--split-max-size", metavar="SIZE", help="several files of at most this, as 500M or 2G")

    lora = formats.add_parser(
        "lora", help="an adapter as GGUF, for edge serve BASE.gguf --lora", parents=[replace]
    )
    lora.add_argument("run", type=Path, metavar="RUN", help="the run folder, with adapter/ in it")

    lora.add_argument("--base", type=Path, help="the model under the adapter (default: what it names)")

    ollama = formats.add_parser("ollama", help="a Modelfile beside the GGUF, for ollama create")
    add_progress_option(ollama)
    ollama.add_argument("run", type=Path, metavar="RUN", help="a run, a folder with a GGUF, or the file")
    ollama.add_argument("--ctx", type=int, default=4096, help="tokens of a conversation (%(default)s)")

    deploy = formats.add_parser(
        "deploy",
        help="the files with which another engine serves a run: RUN/deploy/ENGINE",
        parents=[replace],
    )
    deploy.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    deploy.add_argument("--to", choices=tuple(deploy_targets.TARGETS), required=True, help="the engine")
    deploy.add_argument("--ctx", type=int, help="tokens of a conversation (default: as the model has)")

    onnx = formats.add_parser("onnx", help="RUN/merged -> RUN/onnx, for onnxruntime", parents=[merged])
    onnx.add_argument(
        "--precision",
        choices=onnx_options.PRECISIONS,
        help="default: int8 below a billion parameters, else int4",
    )
    onnx.add_argument(
        "--scheme", choices=tuple(onnx_options.SCHEMES), default="mixed", help="of int4 (%(default)s)"
    )
    onnx.add_argument("--ep", choices=onnx_options.EPS, default="cpu", help="what it is for (%(default)s)")
    onnx.add_argument(
        "--check-with",
        choices=("optimum",),
        help="export nothing: compare what this exporter and another one make in float32 with torch",
    )
    return parser


def _gguf(options: argparse.Namespace) -> None:
    quant = llamacpp_tools.check_quantisation(options.quant, options.imatrix, options.gptq)
    split = gguf_split.parse_size(options.split_max_size) if options.split_max_size else 0
    rounding = {"imatrix": options.imatrix, "gptq": options.gptq}
    if options.ladder:
        if quant or split or any(rounding.values()):
            raise UsageError(
                "--ladder chooses type and rounding itself, and keeps one file", "leave the other options out"
            )
        from convert.export import quant_search

        file = quant_search.run(options.run, overwrite=options.overwrite)
    else:
        from convert.export import gguf

        file = gguf.run(options.run, quant=quant, split=split, overwrite=options.overwrite, **rounding)
    result(path=str(file))


def _lora(options: argparse.Namespace) -> None:
    from convert.export import gguf_lora

    file = gguf_lora.run(options.run, base=options.base, overwrite=options.overwrite)
    result(path=str(file))
    sys.stdout.write(f"{file}\n  serve it: edge serve BASE.gguf --lora {shell(file)}\n")


def _ollama(options: argparse.Namespace) -> None:
    from convert.export import modelfile

    file = modelfile.run(options.run, context=options.ctx)
    result(path=str(file))
    name = shell(file.parent.absolute().parent.name.lower())
    sys.stdout.write(f"{file}\n  take it: ollama create {name} -f {shell(file)}\n")


def _onnx(options: argparse.Namespace) -> None:
    choice = {"precision": options.precision, "scheme": options.scheme, "ep": options.ep}
    # Refuses what does not go together; the default precision, which the model's size decides, always does.
    onnx_options.Recipe(**{**choice, "precision": options.precision or "int8"})
    if options.check_with:
        from convert.export import check_with_optimum

        check_with_optimum.run(options.run)
    else:
        from convert.export import onnx

        result(path=str(onnx.run(options.run, overwrite=options.overwrite, **choice)))


def _deploy(options: argparse.Namespace) -> None:
    folder = deploy_targets.run(options.run, options.to, context=options.ctx, overwrite=options.overwrite)
    result(path=str(folder))
