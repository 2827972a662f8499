"""What a process keeps; each test in one of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PRODUCTS = """
import sys
from pathlib import Path
import torch
from loramill.worker.lora import Product
from loramill.worker.memory import keep_few_products

def anonymous():
    [kilobytes] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(kilobytes) / 1024

keep_few_products()
product = Product(torch.randn(64, 64).to(torch.bfloat16), None)
if not product.is_packed:
    sys.exit("unpacked")
for rows in range(1, 151):
    product(torch.zeros(rows, 64, dtype=torch.bfloat16))
before = anonymous()
for rows in range(151, 551):
    product(torch.zeros(rows, 64, dtype=torch.bfloat16))
print(anonymous() - before)
"""


def test_products_of_ever_other_numbers_of_rows_take_no_more_memory() -> None:
    ended = subprocess.run([sys.executable, "-c", _PRODUCTS], capture_output=True, text=True, check=False)
    if "unpacked" in ended.stderr:
        pytest.skip("this CPU packs no weights")
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 40  # MiB; all 400 together take over 200
