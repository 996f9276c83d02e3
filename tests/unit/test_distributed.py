"""A process alone, and what several would send each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seedbed import distributed, parallel
from seedbed.errors import ConfigError, LostProcessError, StorageError
from seedbed.model.config import from_scratch
from seedbed.model.decoder import Decoder
from seedbed.train.estimate.scaling import BUCKET, Exchange, Link, Traffic


def test_alone_there_is_nothing_to_agree_on() -> None:
    assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
    assert distributed.share(3, 10) == (3, 10)
    assert distributed.total(2.5) == 2.5
    assert list(distributed.most(1, 2)) == [1, 2]
    assert distributed.on_first(lambda: "done") == "done"
    with distributed.joined(), distributed.one_a_node_first():
        assert not distributed.without_weights()


@pytest.mark.parametrize("count", [0, 1, 5, 8, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_all_there_is(monkeypatch: pytest.MonkeyPatch, size: int, count: int) -> None:
    monkeypatch.setattr(distributed, "size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(10, 10 + count))
    assert [number for first, end in shares for number in range(first, end)] == list(range(10, 10 + count))
    assert max(end - first for first, end in shares) == distributed.largest_share(count)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (LostProcessError("process 1 died"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert distributed.is_lost(error) is lost


@pytest.mark.parametrize(
    "error", [StorageError("full"), ConfigError(["one", "two"]), MemoryError("none"), OSError(28, "no")]
)
def test_errors_reach_other_processes_as_they_are(error: Exception) -> None:
    again = distributed._raised(distributed._described(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    if isinstance(error, ConfigError):
        assert isinstance(again, ConfigError)
        assert again.problems == error.problems


def test_memory_of_a_gpu_that_ran_out_reaches_others_as_memory() -> None:
    again = distributed._raised(distributed._described(torch.OutOfMemoryError("CUDA out of memory")))
    assert type(again) is MemoryError


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_group", SimpleNamespace(local_rank=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="no GPU left; start 2 here"):
        distributed.local_device(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda:1: each process takes a GPU of its own"):
        distributed.local_device(torch.device("cuda:1"))


def test_one_process_shares_a_model_with_nobody() -> None:
    model = Decoder(from_scratch("llama", vocab_size=30, d_model=8, num_layers=1, num_heads=2, max_seq_len=8))
    shared = parallel.spread(model, "ddp", torch.device("cpu"), "fp32")
    assert shared.forward is model
    assert not parallel.is_sharded(model)
    norm = torch.ones(())
    assert parallel.whole(norm) is norm


def test_what_is_sent() -> None:
    """A ring sends each number on (n - 1) times, in n parts; added up and handed out again it is twice that."""
    assert Exchange(100, 100, 1, micro_batches=4).ddp(1.0).num_bytes == 0
    assert Exchange(100, 10, 4, micro_batches=4).ddp(1.0).num_bytes == 2 * 3 / 4 * 4 * 10
    sharded = Exchange(100, 100, 4, micro_batches=3, product_bytes=2).fsdp(1.0)
    assert sharded.num_bytes == 3 * 3 / 4 * (2 * 2 * 100 + 4 * 100)


def test_how_many_messages_wait_for_one_another() -> None:
    """A tree of 8 is three deep, up and down, for each bucket; a ring of 8 has seven links, three times a unit."""
    trained = BUCKET / 4 * 1.5
    alone, eight = (Exchange(trained, trained, count, micro_batches=4, units=13) for count in (1, 8))
    assert alone.ddp(1.0).messages == 0
    assert eight.ddp(1.0).messages == 2 * 2 * 3
    assert eight.fsdp(1.0).messages == 4 * 13 * 3 * 7


def test_what_is_sent_hides_behind_the_way_back() -> None:
    step = Traffic(num_bytes=1e9, messages=1000, seconds=3.0)
    assert step.efficiency(Link(1e9, 1e-3)) == 1.0
    assert step.efficiency(Link(0.25e9, 0.0)) == pytest.approx(3 / (3 + 4 - 2))
    assert step.efficiency(Link(0.25e9, 1e-3)) == pytest.approx(3 / (3 + 4 + 1 - 2))
