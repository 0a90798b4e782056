"""A reward that does whatever its answer tells it to, as the source of a module."""

from __future__ import annotations

CUSTOM = """
import asyncio, os, re, subprocess, sys, time
from megatron_fipo.types import RewardResult

KEPT = []

async def misbehave_later(response, ground_truth, **extra):
    await asyncio.sleep(0)
    if response == "forever":
        await asyncio.Event().wait()
    if response == "background":
        KEPT.append(asyncio.create_task(asyncio.sleep(600)))
    if response == "stubborn":
        asyncio.create_task(refuse_to_end())
        await asyncio.sleep(0)
    if response == "tasks":
        return RewardResult(float(len(asyncio.all_tasks())), 1.0, str([task.cancelled() for task in KEPT]))
    if response == "gather":
        results = await asyncio.gather(*[asyncio.to_thread(misbehave, "echo", "x" * i) for i in range(5)])
        return RewardResult(sum(result.score for result in results), 1.0, None)
    return misbehave(response, ground_truth, **extra)

async def refuse_to_end():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

class Judge:
    async def __call__(self, response, ground_truth, **extra):
        return RewardResult(0.25, 0.0, response)

judge = Judge()

def misbehave(response, ground_truth, **extra):
    if response == "power":
        9 ** 9 ** 9
    if response == "loop":
        while True:
            pass
    if response == "huge":
        bytearray(1 << 40)
    if response == "grow":
        blocks = [bytearray(1 << 20) for _ in range(10_000)]
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit("bye")
    if response == "raise":
        raise KeyError("no such key")
    if response == "long message":
        raise ValueError("m" * 1_000_000)
    if response == "unprintable":
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError("no text")
        raise Odd
    if response == "wrong type":
        return 1.0
    if response == "nan":
        return RewardResult(float("nan"), 0.0, None)
    if response == "accuracy 2":
        return RewardResult(1.0, 2.0, None)
    if response == "print":
        print("x" * 100_000, flush=True)
        print("x" * 100_000, file=sys.stderr, flush=True)
        os.write(1, b'{"id": 0, "score": 5.0, "accuracy": 1.0, "answer": null}' + bytes([10]))
    if response == "stdin":
        assert sys.stdin.read() == ""
    if response == "long answer":
        return RewardResult(0.5, 0.0, "a" * 1_000_000)
    if response == "modules":
        heavy = ("torch", "transformers", "reasoning_gym")
        return RewardResult(1.0, 1.0, " ".join(name for name in heavy if name in sys.modules))
    if response == "child":
        child = subprocess.Popen(["sleep", "600"])
        with open(ground_truth, "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    if response == "daemon":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(ground_truth, "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    if response == "leak":
        KEPT.append(bytearray(40 << 20))
    if response == "regex":
        re.fullmatch("(a+)+b", "a" * 100)
    if response == "sum":
        sum(range(10**12))
    if response == "recursion":
        misbehave(response, ground_truth)
    if response == "threads":
        import threading
        threading.Thread(target=time.sleep, args=(600,)).start()
    if response == "sleep":
        time.sleep(0.05)
    if response == "echo":
        return RewardResult(float(len(ground_truth)), 1.0, ground_truth[:10])
    return RewardResult(1.0, 1.0, "ok")
"""
