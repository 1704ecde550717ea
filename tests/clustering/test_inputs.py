"""Values as people have them: tensors, NumPy arrays, lists of numbers; and sentences for everything else."""

import numpy as np
import pytest
import torch

import kmq_kernels as kmq

VALUES = [0.0, 0.5, 10.0, 10.5]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(VALUES),
        np.array(VALUES, np.float32),
        np.array(VALUES, ">f4"),
        np.array(VALUES + VALUES, np.float32)[:4],
        np.array(VALUES, np.float16),
        VALUES,
        tuple(VALUES),
        [0, 0.5, 10, 10.5],
    ],
)
def test_values_of_one_problem(values):
    for cluster in (kmq.kmeans, kmq.linear_codebook):
        result = cluster(values, 2)
        assert result.centroids.tolist() == [0.25, 10.25]
        assert result.assignments.tolist() == [0, 0, 1, 1]


def test_several_problems_and_weights():
    arrays = [np.array(VALUES, np.float32), torch.tensor(VALUES)]
    assert [result.centroids.tolist() for result in kmq.kmeans(arrays, 2)] == [[0.25, 10.25]] * 2
    assert kmq.kmeans(np.array([VALUES, VALUES], np.float32), 2).centroids.tolist() == [[0.25, 10.25]] * 2
    heavy = [3.0, 1.0, 1.0, 3.0]  # means 0.5 / 4 and (10 + 31.5) / 4
    for weight in (heavy, np.array(heavy, np.float32), torch.tensor(heavy)):
        assert kmq.kmeans(VALUES, 2, sample_weight=weight).centroids.tolist() == [0.125, 10.375]


def test_an_array_is_not_changed_and_not_shared():
    values = np.array(VALUES, np.float32)
    values.flags.writeable = False
    kmq.kmeans(values, 2)
    codes = np.array([[0, 1, 2, 3]], np.uint8)
    packed = kmq.pack(codes, 2)
    codes[:] = 0
    assert kmq.unpack(packed.numpy(), 2, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            np.arange(4),
            "values: expected a floating-point tensor, a NumPy array or a list of numbers, got a NumPy array of int64",
        ),
        (np.array(["a"]), "got a NumPy array of <U1"),
        ("0.5", "values: expected a floating-point tensor, a NumPy array or a list of numbers, got str"),
        ({"a": 1}, "got dict"),
        (["a", "b"], r"values\[0\]: expected a floating-point tensor, a NumPy array or a list of numbers, got str"),
        (torch.arange(4), "values: expected a floating-point tensor, got one of torch.int64"),
    ],
)
def test_what_cannot_be_clustered(values, sentence):
    with pytest.raises(TypeError, match=sentence):
        kmq.kmeans(values, 2)


@pytest.mark.parametrize("call", [lambda codes: kmq.pack(codes, 2), lambda codes: kmq.unpack(codes, 2, 4)])
def test_what_cannot_be_packed(call):
    with pytest.raises(TypeError, match="expected a tensor or NumPy array of uint8, got list"):
        call([1, 2])
    with pytest.raises(TypeError, match="expected uint8"):
        call(np.array([1.0]))
