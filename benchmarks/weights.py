"""Loading a folder of safetensors files into a cut layout: memory and time, rank by rank.

    python benchmarks/weights.py [--ranks 4] [--mb 1000] [--zero 3]

A Hugging Face folder (a model shaped like llama, several files with an index) is written, the model is
constructed on meta, and `sixfold.initialize(model, weights=folder)` runs on every rank. Memory is
`Pss_Anon + Pss_Shmem` of /proc/self/smaps_rollup, summed over ranks, before and after: a page that ranks
share counts once, mapped code not at all. Ranks have made a tiny engine before, for what is loaded once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contest import run_ranks

WIDTH, FILES = 1024, 4


def memory_bytes() -> int:
    """This process's memory; of pages that others map as well its part."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def model_of(num_layers: int, dtype: str) -> Any:
    """A causal language model of Hugging Face on meta, one block about 50 MB in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def write_folder(folder: Path, num_layers: int, dtype: str) -> int:
    """The model's numbers in several files with an index; returns their bytes."""
    import torch
    from safetensors.torch import save_file

    state = model_of(num_layers, dtype).state_dict()
    names = list(state)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(FILES):
        part = names[number::FILES]
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        torch.manual_seed(number)
        save_file({name: torch.randn_like(state[name], device="cpu") for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def work(arguments: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    import sixfold

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = {"layout": {"zero": arguments.zero}}
    sixfold.initialize(torch.nn.Linear(8, 8), config=config)
    model = model_of(layers_of(arguments.mb, arguments.dtype), arguments.dtype)
    if arguments.frozen:
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    dist.barrier()
    before = memory_bytes()
    dist.barrier()
    began = time.perf_counter()
    engine = sixfold.initialize(model, config=config, weights=arguments.folder)
    took = time.perf_counter() - began
    dist.barrier()
    grown = torch.tensor([float(memory_bytes() - before)], dtype=torch.float64)
    dist.all_reduce(grown)
    whole = engine.full_state_dict() if arguments.check else {}
    if dist.get_rank() == 0:
        if arguments.check:
            check(whole, Path(arguments.folder))
        print(json.dumps({"grown_bytes": grown.item(), "seconds": took}), flush=True)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def check(whole: dict[str, Any], folder: Path) -> None:
    """Every tensor as it lies in the files."""
    import torch
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.equal(whole[name], tensor.to(whole[name].dtype)):
                raise SystemExit(f"{name} differs")


def layers_of(mb: float, dtype: str) -> int:
    """Blocks for a file of about so many MB."""
    size = 4 if dtype == "float32" else 2
    return max(1, round((mb * 1e6 / size - 2 * 4096 * WIDTH) / (4 * WIDTH**2 + 3 * 2816 * WIDTH)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, start the ranks, and gather their figures."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        num_bytes = write_folder(Path(folder), layers_of(arguments.mb, arguments.dtype), arguments.dtype)
        command = [__file__, *sys.argv[1:], "--work", "--folder", folder]
        result: dict[str, Any] = run_ranks(command, arguments.ranks)
    return {**result, "file_bytes": num_bytes}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mb", type=float, default=1000, help="size of the files")
    parser.add_argument("--zero", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the files")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    parser.add_argument("--check", action="store_true", help="compare every number; takes whole copies")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--smoke", action="store_true", help="two ranks, a tiny file: does it run?")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print, or be one of the ranks."""
    arguments = parse()
    if arguments.smoke:
        arguments.mb, arguments.ranks = 60, 2
    if arguments.work:
        work(arguments)
        return
    found = measure(arguments)
    ratio = found["grown_bytes"] / found["file_bytes"]
    print(
        f"{found['file_bytes'] / 1e6:.0f} MB in {FILES} files on {arguments.ranks} ranks: memory "
        f"grew by {found['grown_bytes'] / 1e6:.0f} MB, {ratio:.3f} of the files, in {found['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
