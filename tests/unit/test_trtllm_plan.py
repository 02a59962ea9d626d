"""What travels to the ranks arrives as it was sent."""

from __future__ import annotations

import pickle

from kvferry.connector.layout import BlockLayout
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs
from kvferry.engines.trtllm.plan import StepPlan

LAYOUT = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=64, head_dim=16, itemsize=2, dtype="bfloat16")


def test_a_plan_survives_the_engines_way_of_copying_it() -> None:
    copies = (BlockCopy(1, 2, 0, (3, 4)),)
    jobs = StepJobs(layout=LAYOUT, loads=[LoadJob("7", copies)], saves=[SaveJob(1, "8", copies)], fences=[5])
    plan = StepPlan(jobs=jobs, mailbox="m", sync_loads=("7",), empty_loads=("9",), step=3)
    received = pickle.loads(pickle.dumps(plan))  # noqa: S301  # as the engine does, of what was written here
    assert received == plan
    assert received.jobs is not jobs


def test_a_plan_of_nothing_is_a_plan() -> None:
    plan = StepPlan()
    assert plan
    assert (plan.mailbox, plan.jobs, plan.jobs.loads) == ("", StepJobs(), [])
    assert StepPlan().jobs is not plan.jobs
