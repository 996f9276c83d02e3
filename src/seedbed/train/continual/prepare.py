"""Adding a domain to what a model knows: the run begins with its memory, and with what holds it to that.

Each way of holding on is a part of the job that the loop knows nothing of: rows that replay, anchors that pull,
weights interpolated at the end. Learning rates are warmed up again and decay again, as in any run.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from seedbed import distributed
from seedbed.adapter import CONFIG_FILE as ADAPTER_FILE
from seedbed.checkpoint import find_base
from seedbed.config import STRENGTHS, Config
from seedbed.device import pick_device
from seedbed.model.decoder import Decoder
from seedbed.runs.history import BASE
from seedbed.train.continual.conclude import Conclusion
from seedbed.train.continual.holding import Anchors, make_anchors, reading_of_stored, rows_with_replay
from seedbed.train.continual.memory import FISHER_FILE, SELF_REPLAY_FILE, Memory, begin_memory, recall, refuse_overlap
from seedbed.train.continual.methods import choose_methods, inherit_learning_rate
from seedbed.train.corpus import store_documents, validation_rows
from seedbed.train.finetune import load_prepared, prepare_finetune
from seedbed.train.ingredients import Ingredients, Prepared
from seedbed.train.job import Earlier, Keeping, Validation
from seedbed.train.measure import Meter, measure
from seedbed.train.progress import Display
from seedbed.train.resume import Start
from seedbed.train.stopping import StopRequest


def from_earlier_model(start: Start, config: Config, display: Display) -> Ingredients:
    """A pretrained model as for fine-tuning, the new domain's rows and earlier text among them, and its anchors.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong, before any training.
    """
    run = _own_folder(start.run.path)
    recalled = recall(run, config)
    memory = recalled or begin_memory(config, run, display)
    folder = _weights_below(memory.origin) if config.with_lora else memory.origin
    if recalled is None:
        config, memory = _choose(config, memory, display)
    prepared = prepare_finetune(config, folder, display, start)
    config = prepared.config
    device = pick_device(config.training.device)

    def load_old() -> Decoder:
        return load_prepared(replace(start, checkpoint=None), prepared, folder, display).to(device)

    model = load_prepared(start, prepared, folder, display).to(device)
    texts = _held_out_texts(memory, prepared, display)
    if recalled is None:
        meter = Meter(load_old() if start.checkpoint else model, device, config.training)
        memory = _measured(memory, meter, texts, config.data.max_seq_len, display)
    _announce(memory, texts, display)
    rows = rows_with_replay(prepared, memory, load_old if start.checkpoint else lambda: model, run, display)
    anchors = make_anchors(load_old, config, model, texts, memory, run, display)
    memory.keep()
    return Ingredients(prepared, model, rows, _keeping(config, memory, texts, anchors, load_old))


def _choose(config: Config, memory: Memory, display: Display) -> tuple[Config, Memory]:
    """The config with the rate and the methods that are taken for the new domain; the memory says which and why."""
    config = inherit_learning_rate(config, memory.origin)
    config, why = choose_methods(config, memory)
    refuse_overlap(memory, config, display)
    return config, memory.with_learning(replace(memory.learning, why=why, method=_account(config)))


def _measured(memory: Memory, meter: Meter, texts: dict[str, Validation], max_seq_len: int, display: Display) -> Memory:
    """The memory with what each domain's held-out text costs the old model."""
    with display:
        before = measure(meter, texts, StopRequest(), display) or {}
    return memory.with_learning(replace(memory.learning, before=before, max_seq_len=max_seq_len))


def _keeping(
    config: Config,
    memory: Memory,
    texts: dict[str, Validation],
    anchors: Anchors,
    load_old: Callable[[], Decoder],
) -> Keeping:
    keeping, before = config.keeping, memory.learning.before
    most = math.inf if keeping.max_forgetting is None else keeping.max_forgetting
    return Keeping(
        weight_anchors=anchors.of_weights,
        prediction_anchors=anchors.of_predictions,
        earlier=tuple(
            Earlier(stage.domain, texts[stage.domain], before[stage.domain].loss)
            for stage in memory.earlier
            if stage.domain in texts
        ),
        max_forgetting=most,
        on_forgetting=keeping.on_forgetting,
        companions=memory.folder,
        conclude=Conclusion(memory, texts, load_old, bool(keeping.interpolate), most),
    )


def _own_folder(run: Path) -> Path:
    """Where this process keeps the texts and the figures of the run: the first in the run, others beside it, alike."""
    own = run
    if not distributed.is_first():
        own = Path(tempfile.mkdtemp(prefix="seedbed-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        for name in ("config.yaml", "history", SELF_REPLAY_FILE, FISHER_FILE):
            if (run / name).is_dir():
                shutil.copytree(run / name, own / name)
            elif (run / name).exists():
                shutil.copyfile(run / name, own / name)
    distributed.together(lambda: None)  # before the first one changes them
    return own


def _account(config: Config) -> dict[str, object]:
    """What the history says of how this domain is learnt."""
    keeping, adapt = config.keeping, config.adapt
    method: dict[str, object] = {name: value for name in STRENGTHS if (value := getattr(keeping, name))}
    if config.with_lora:
        method["lora"] = adapt.lora_r
    method |= {name: value for name in ("last_blocks", "freeze") if (value := getattr(adapt, name))}
    return {**method, "learning_rate": config.training.learning_rate}


def _weights_below(origin: Path) -> Path:
    """A new adapter stands beside the ones of earlier domains, on the base that they have in common."""
    return find_base(origin) if (origin / ADAPTER_FILE).is_file() else origin


def _held_out_texts(memory: Memory, prepared: Prepared, display: Display) -> dict[str, Validation]:
    """Rows to measure each domain on, for those of which something was held out."""
    config, texts = prepared.config, {}
    for stage in memory.history.stages:
        if documents := memory.held_out(stage.domain):
            reading = reading_of_stored(stage, prepared.reading)
            store = store_documents(documents, stage.format, reading, f"held-out {stage.domain}", display)
            texts[stage.domain] = validation_rows(store, config.data, config.training.seed)
    return texts


def _announce(memory: Memory, texts: dict[str, Validation], display: Display) -> None:
    learning = memory.learning
    display.line()
    if len(memory.history.stages) == 2:
        display.line(f"{memory.origin} has no history of domains; one begins here")
    for stage in memory.earlier:
        if stage.domain not in texts:
            display.line(
                "Nothing measures what the model knew before its first domain; --general_data names text for that"
                if stage.domain == BASE
                else f"Nothing of {stage.domain} was held out, so nothing measures whether it is forgotten"
            )
    for domain, figure in learning.before.items():
        display.line(f"Before: {domain} {figure.loss:.4f} nats a token, {figure.bits_per_byte:.4f} bits per byte")
    if learning.why:
        display.line(f"Method chosen: {learning.why}")
