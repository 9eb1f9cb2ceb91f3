"""Turn what `make gpu-check` measured into the preferences of `auto` between Triton and CUDA C++ on that GPU.

    python scripts/preferences.py benchmarks/results/nvidia-h100-80gb-hbm3.json [--to FOLDER]

Writes sdan_fast/preferences/<gpu>.json (its format is in that package's docstring). A case counts where both backends
were timed and neither was wrong; where several directions were, their times are added, as training pays for both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdan_fast import preferences

Row = dict[str, Any]


LAYOUTS = {"NCHW": "contiguous", "channels_last": "channels_last"}


def traits(row: Row) -> tuple[str, ...]:
    """What preferences tell calls apart by, in the order of FORMAT_KEYS."""
    kind = ""
    if row["op"] == "depthwise_conv2d":
        taps = row["variant"].split()[0].split("x")  # of "1x11 d6"
        kind = preferences.kind_of_taps(*map(int, taps))
    return row["op"], kind, LAYOUTS[row["layout"]], row["dtype"]


def decide(rows: Iterable[Row]) -> list[Row]:
    """The preferences that the rows of a benchmark amount to; variants of a kind (dilations) count together."""
    times: dict[tuple[str, ...], dict[int, dict[str, dict[tuple[str, str], float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for row in rows:
        if row["contender"] not in ("triton", "cuda") or "seconds" not in row:
            continue
        call = (row["variant"], row["pass"])
        times[traits(row)][math.prod(row["shape"])][row["contender"]][call] = row["seconds"]["p50"]
    entries = []
    for key, by_size in sorted(times.items()):
        sizes = []
        for elements, found in sorted(by_size.items()):
            both = set(found["triton"]) & set(found["cuda"])
            if not both:
                continue
            triton, cuda = (sum(found[name][call] for call in both) for name in ("triton", "cuda"))
            backend, ratio = ("cuda", triton / cuda) if cuda < triton else ("triton", cuda / triton)
            sizes.append({"elements": elements, "backend": backend, "ratio": round(ratio, 3)})
        if sizes:
            entries.append({**dict(zip(preferences.FORMAT_KEYS, key, strict=True)), "sizes": sizes})
    return entries


def convert(results: Row) -> Row:
    """A file of preferences from a file of gpu_check's."""
    bench = results["bench"]
    if not bench["ok"]:
        raise ValueError("the benchmark did not pass, so its times decide nothing")
    measured = {key: bench.get(key) for key in ("when", "commit", "versions")}
    return {"gpu": results["gpu"], "measured": measured, "preferences": decide(bench["rows"])}


def main(arguments: list[str] | None = None) -> int:
    """0 if a file was written, 1 if the results hold nothing to compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="a file of benchmarks/results")
    parser.add_argument("--to", type=Path, default=preferences.FOLDER, help="folder (default: the package's)")
    options = parser.parse_args(arguments)
    try:
        found = convert(json.loads(options.results.read_text(encoding="utf-8")))
    except (KeyError, ValueError) as error:
        print(f"{options.results}: {error}", file=sys.stderr)
        return 1
    if not found["preferences"]:
        print(f"{options.results}: no case was timed with both triton and cuda", file=sys.stderr)
        return 1
    path = preferences.file_of(found["gpu"], options.to)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    preferences.load(path)  # what was written can be read
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
