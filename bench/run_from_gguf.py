"""A run to measure out of a GGUF file alone: `python -m bench.run_from_gguf MODEL.gguf RUN`.

The file's weights, dequantised by transformers, become RUN/merged in 16 bits, as `edge merge` writes them;
from there `edge export gguf RUN` makes the artefact. So the baseline and every other server have the same
model, also where one is only to be had quantised. Export compares token ids, template and logits as always.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edge.artefact import manifest
from edge.artefact.gguf_header import read_header
from edge.console import guarded
from edge.errors import InputError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_from_gguf", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="a GGUF file of any type that transformers reads")
    parser.add_argument("run", type=Path, help="the run folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call left there")
    args = parser.parse_args(argv)
    folder = make(args.file, args.run, overwrite=args.overwrite)
    sys.stdout.write(json.dumps({"merged": str(folder)}, ensure_ascii=False) + "\n")
    return 0


def make(file: Path, run: Path, *, overwrite: bool = False) -> Path:
    """Write RUN/merged; its path. Raises InputError for a file that is no GGUF or that transformers cannot
    read, ExistsError without `overwrite`.
    """
    from convert.model import chat_format, from_gguf

    header = read_header(file)
    target = run / "merged"
    manifest.check_target(target, overwrite)
    # Of four bits and more, sixteen: what is written. transformers holds it in 32 bits meanwhile.
    manifest.check_free(run, 4 * header.weights_bytes)
    try:
        tokenizer, model = from_gguf.load(file, "float16")
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"transformers cannot read {file}: {error}", "give a model that it knows") from error
    with manifest.publish(target, overwrite=overwrite) as partial:
        from_gguf.save(tokenizer, model, partial, tokenizer.eos_token_id)
        form = chat_format.load(partial)
        (partial / "chat_template.jinja").write_bytes(form.source.encode("utf-8"))
        manifest.write(
            partial,
            manifest.Manifest(
                stage="merged",
                name=run.resolve().name,
                base_model=header.name or file.stem,
                settings={"source": file.name, "quant": header.file_type, "dtype": "float16"},
                chat_template=manifest.text_digest(form.source),
                stop_ids=form.stop_ids,
                versions=manifest.versions("edge", "transformers", "gguf", "tokenizers"),
            ),
        )
    return target


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
