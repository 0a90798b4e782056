"""Recorded rollouts: exact, atomic, and clear about what is missing or damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.trainer.recording import group_from_dict, group_to_dict, read_rollouts, write_rollouts
from megatron_fipo.types import GraderError, Group, Problem, Prompt, RewardResult, Sample

ODD_FLOATS = np.array(
    [-0.1, -1e-38, -1e-45, -0.0, -3.4e38, -np.inf, np.nextafter(np.float32(-1), np.float32(0))], np.float32
)


def make_groups() -> list[Group]:
    chat = Problem("a:1", ({"role": "user", "content": "1+1?\u2028\x00"},), "2", "1+1=", {"nested": {"list": [1, 2.5]}})
    plain = Problem("b:2@1", "é\n\ud800", "")
    rng = np.random.default_rng(0)
    groups = []
    for problem in (chat, plain):
        samples = []
        for i, n in enumerate((7, 0, 5)):
            logprobs = ODD_FLOATS if n == 7 else -rng.random(n, dtype=np.float32)
            result = RewardResult(0.1 + 0.2, 1.0, None if i else "2") if i < 2 else GraderError("timeout", "10 s\n")
            samples.append(
                Sample(
                    uid=f"{problem.uid}/{i}",
                    response_ids=rng.integers(0, 2**40, n),
                    rollout_logprobs=logprobs,
                    loss_mask=rng.random(n) < 0.7,
                    token_versions=np.sort(rng.integers(0, 2**40, n)),
                    finish_reason="stop",
                    text="text\n",
                    result=result,
                    reward=-1 / 3,
                )
            )
        groups.append(Group(Prompt(problem, np.array([5, 6])), tuple(samples)))
    return groups


def seal(path: Path, lines: list[str]) -> None:
    """A recording of these lines with the checksum that belongs to them."""
    body = "".join(line + "\n" for line in lines)
    path.write_text(body + json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n")


def test_groups_survive_a_recording_bit_for_bit(tmp_path: Path) -> None:
    groups = make_groups()
    metrics = {"num_gen_batches": 3, "time/rollout/generation": 0.1 + 0.2}
    path = write_rollouts(str(tmp_path / "new"), 12, groups, metrics)
    assert path.name == "step_000012.jsonl"
    found, found_metrics = read_rollouts(str(tmp_path / "new"), 12)
    assert found_metrics == metrics
    assert [group.prompt.problem for group in found] == [group.prompt.problem for group in groups]
    for group, again in zip(groups, found, strict=True):
        assert again.prompt.token_ids.tolist() == group.prompt.token_ids.tolist()
        for a, b in zip(group.samples, again.samples, strict=True):
            for name in ("response_ids", "rollout_logprobs", "loss_mask", "token_versions"):
                found_array, array = getattr(b, name), getattr(a, name)
                assert (found_array.tobytes(), found_array.dtype) == (array.tobytes(), array.dtype), name
            assert (a.uid, a.finish_reason, a.text) == (b.uid, b.finish_reason, b.text)
            assert (a.result, a.reward) == (b.result, b.reward)


def test_a_step_is_replaced_whole_and_no_temporary_file_stays(tmp_path: Path) -> None:
    groups = make_groups()
    write_rollouts(str(tmp_path), 1, groups, {})
    write_rollouts(str(tmp_path), 1, groups[:1], {})
    assert len(read_rollouts(str(tmp_path), 1)[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.jsonl"]


def test_a_failed_recording_leaves_the_old_one(tmp_path: Path) -> None:
    groups = make_groups()
    write_rollouts(str(tmp_path), 1, groups, {})
    bad = Group(Prompt(Problem("x", "?", "", extra={"when": object()}), np.array([1])), ())
    with pytest.raises(TypeError):
        write_rollouts(str(tmp_path), 1, [bad], {})
    assert len(read_rollouts(str(tmp_path), 1)[0]) == 2


def test_a_missing_step_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--replay-rollouts is .*nowhere'.*no step 3 \(it holds none\)"):
        read_rollouts(str(tmp_path / "nowhere"), 3)
    for step in (1, 2):
        write_rollouts(str(tmp_path), step, make_groups(), {})
    with pytest.raises(ValueError, match=r"no step 3 \(it holds 2 steps from 1 to 2\)"):
        read_rollouts(str(tmp_path), 3)


def test_a_file_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups(), {})
    content = path.read_bytes()
    for size in range(0, len(content) - 1, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"step_000001\.jsonl"):
            read_rollouts(str(tmp_path), 1)
    seal(path, content.decode().splitlines()[:-2])
    with pytest.raises(ValueError, match="holds 1 groups, but its header says 2: it is cut off"):
        read_rollouts(str(tmp_path), 1)


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups(), {"score": 0.5})
    content = path.read_bytes()
    for i in range(0, len(content), 11):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        with pytest.raises(ValueError, match=r"step_000001\.jsonl"):
            read_rollouts(str(tmp_path), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2: found list, wanted an object"),
        ("{}", "line 2: not a recorded group: KeyError: 'problem'"),
        ('{"problem": {"uid": 1}, "prompt_ids": [], "samples": []}', "line 2: not a recorded group"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups()[:1], {})
    seal(path, [path.read_text().splitlines()[0], line])
    with pytest.raises(ValueError, match=message):
        read_rollouts(str(tmp_path), 1)


def test_another_steps_or_formats_file_is_refused(tmp_path: Path) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups(), {})
    path.rename(tmp_path / "step_000002.jsonl")
    with pytest.raises(ValueError, match="line 1: found no header of format 3 for step 2"):
        read_rollouts(str(tmp_path), 2)


@pytest.mark.parametrize(("older", "since"), [(1, "who drew it"), (2, "ends with a checksum")])
def test_a_recording_of_an_older_format_says_so(tmp_path: Path, older: int, since: str) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups(), {})
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(header), "format": older}), *lines]))
    with pytest.raises(
        ValueError, match=rf"step_000001\.jsonl is of format {older}, but must be of format 3.*{since}.*anew"
    ):
        read_rollouts(str(tmp_path), 1)


@pytest.mark.parametrize("name", ["response_ids", "rollout_logprobs", "loss_mask", "token_versions"])
def test_arrays_of_unequal_lengths_are_refused(name: str) -> None:
    data = json.loads(json.dumps(group_to_dict(make_groups()[0])))
    data["samples"][0][name].pop()
    with pytest.raises(ValueError, match="'a:1/0' has unequal numbers of tokens, log-probs, mask entries or versions"):
        group_from_dict(data)


def test_a_mask_of_anything_but_0_and_1_is_refused() -> None:
    data = json.loads(json.dumps(group_to_dict(make_groups()[0])))
    data["samples"][0]["loss_mask"][0] = 2
    with pytest.raises(ValueError, match="something else than 0 and 1"):
        group_from_dict(data)


@pytest.mark.parametrize("missing", ["num_groups", "metrics"])
def test_a_header_without_its_counts_is_no_header(tmp_path: Path, missing: str) -> None:
    path = write_rollouts(str(tmp_path), 1, make_groups(), {})
    header, *lines = path.read_text().splitlines()
    kept = {name: value for name, value in json.loads(header).items() if name != missing}
    seal(path, [json.dumps(kept), *lines[:-1]])
    with pytest.raises(ValueError, match="line 1: found no header"):
        read_rollouts(str(tmp_path), 1)
