"""The numbers by which the processes of one student are compared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from logitstream.errors import RanksDiffer
from logitstream.training.data_parallel import difference, digests, expect_all_processes, joined_by


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 5)
        self.head.weight.data = self.head.weight.data.bfloat16()
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.scale = nn.Parameter(torch.tensor(1.0))


def test_equal_students_do_not_differ() -> None:
    student = Student()
    other = copy.deepcopy(student)
    other.get_buffer("scratch").add_(1)  # what is not saved is each process's own
    assert len(digests(student)) == 4
    assert difference([digests(student), digests(other)]) is None


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "bias", "scale"])
def test_one_bit_in_one_tensor_is_found_and_named(name: str) -> None:
    students = [Student() for _ in range(3)]
    with torch.no_grad():
        tensor = students[2].state_dict()[name].view(-1)
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        bits[-1] ^= 1
    found = difference([digests(student) for student in students])
    assert found == f"1 of 4 tensors ({name}), between ranks 0+1, 2"


def test_a_parameter_that_one_process_lacks_is_named() -> None:
    more = Student()
    more.adapter = nn.Linear(2, 2)
    assert difference([digests(Student()), digests(more)]) == "not every rank has adapter.bias, adapter.weight"


def test_many_names_are_cut_short() -> None:
    one: dict[tuple[str, tuple[int, ...]], int] = {(f"w{index}", ()): index for index in range(9)}
    other = {key: digest + 1 for key, digest in one.items()}
    assert difference([one, other]) == "9 of 9 tensors (w0, w1, w2 and 6 more), between ranks 0, 1"


def test_shards_are_compared_with_their_replicas_alone() -> None:
    numbers: list[tuple[tuple[int, ...], int]] = [((0,), 5), ((1,), 6), ((0,), 5), ((1,), 7)]
    shards = [{("w", place): digest} for place, digest in numbers]
    assert difference(shards[:3]) is None
    assert difference(shards) == "1 of 2 tensors (w), between ranks 1, 3"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_all_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect_all_processes(2)
    with pytest.raises(RanksDiffer, match=r"2 processes were started .* ACCELERATE_USE_CPU=true"):
        expect_all_processes(1)


def test_a_bare_student_is_joined_by_nothing() -> None:
    assert joined_by(Student()) is None
