"""The budget under a limit that the kernel enforces: no more data than the libraries had, the budget, and 64 MB.

RLIMIT_DATA counts private writable mappings and the heap, whether touched or not. RLIMIT_AS would count mapped
libraries and files as well, which are not memory that anybody has to give.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_config, write_checkpoint

from mlx_moecache.errors import BudgetError
from mlx_moecache.loading import MemoryOptions, OpenedModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA does not cover mappings elsewhere")

PROMPT, REPLY = 200, 20  # tokens
SLACK = 64 * 2**20
STACK_KB = 1024  # of each thread: at the usual 8 MB, eight threads would reserve all of the slack, and never use it

PROGRAM = """
import re, resource, sys
from pathlib import Path
from mlx_moecache.expert_cache import ExpertCache
from mlx_moecache.generation import stream_generate
from mlx_moecache.loading import CacheOptions, MemoryOptions, OpenedModel

folder, memory, prompt, reply, slack, *flags = sys.argv[1:]

if "unlimited" not in flags:
    before = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    limit = before + int(memory) + int(slack)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if "leak" in flags:
    load, kept = ExpertCache.load, []
    def leaking(self, layer, loads, stats, **how):
        load(self, layer, loads, stats, **how)
        kept.extend(bytearray(layer.pool.view(0, x.slot)) for x in loads)
    ExpertCache.load = leaking
opened = OpenedModel(Path(folder))
tokenizer = opened.tokenizer()
tokens = [7 * i % 251 for i in range(int(prompt))]
model = opened.load(
    MemoryOptions(memory=int(memory), max_context=len(tokens) + int(reply), max_prompt=len(tokens)),
    CacheOptions(routing="original", direct_io="direct" in flags),
)
made = []
for response in stream_generate(model, tokenizer, tokens, max_tokens=int(reply)):
    made.append(response.token)
print("made", len(made), "tokens with", model.expert_cache.slots_per_layer[0], "slots")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """124 MB of experts, 40 in each of 4 layers, and 22 MB of everything else."""
    config = tiny_config(
        "qwen2_moe",
        vocab_size=1000,
        hidden_size=448,
        num_hidden_layers=4,
        num_attention_heads=7,
        num_key_value_heads=7,
        num_experts=40,
        moe_intermediate_size=144,
        shared_expert_intermediate_size=448,
    )
    return write_checkpoint(tmp_path_factory.mktemp("large") / "model", config, tokenizer=True)


def smallest(folder: Path) -> int:
    """Bytes of the smallest budget that is accepted."""
    with pytest.raises(BudgetError) as error:
        OpenedModel(folder).plan(MemoryOptions(memory=1, max_context=PROMPT + REPLY, max_prompt=PROMPT))
    found = re.search(r"the smallest that works is ([\d.]+) MB \(", str(error.value))
    assert found is not None
    return int(float(found[1]) * 1e6)


def generate(folder: Path, memory: int, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = [PROGRAM, str(folder), *map(str, (memory, PROMPT, REPLY, SLACK)), *flags]
    return subprocess.run(
        ["sh", "-c", f'ulimit -s {STACK_KB} && exec "$0" -c "$@"', sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(("more", "flags"), [(0, []), (20_000_000, ["direct"])], ids=["smallest", "direct reads"])
def test_a_reply_finishes_within_the_limit(large: Path, more: int, flags: list[str]) -> None:
    checkpoint = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    memory = smallest(large) + more
    assert memory + SLACK < checkpoint  # else the limit would mean nothing
    done = generate(large, memory, *flags)
    assert done.returncode == 0, done.stderr
    assert f"made {REPLY} tokens" in done.stdout


def test_a_leak_is_caught_by_the_limit_alone(large: Path) -> None:
    memory = smallest(large)
    caught = generate(large, memory, "leak")
    assert caught.returncode != 0 and "made" not in caught.stdout
    unlimited = generate(large, memory, "leak", "unlimited")
    assert unlimited.returncode == 0, unlimited.stderr
    assert f"made {REPLY} tokens" in unlimited.stdout
