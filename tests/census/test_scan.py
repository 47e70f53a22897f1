"""A scan's figures do not depend on batches, processes or interruptions, and are those of the stored activations."""

import contextlib
import io
import json
import random
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import children
import melayer
import toys
from command import failing
from command import run as melayer_command
from damaged import damaged
from hostile import corpora, stores
from melayer.census import state as scan_state
from melayer.census import worker
from melayer.census.observe import SITES
from melayer.census.report import write_scan_report
from melayer.census.scan import scan
from melayer.data.corpus import Corpus
from melayer.data.rows import Row, batches
from melayer.errors import InputError, MelayerError, MelayerWarning, OutputError, ProcessError
from melayer.model import wiring
from melayer.runs.processes import Group
from observed import check, stored

PLANTED = [(3, 7, 3000.0)]
COUNT = 40


def texts(count: int = COUNT) -> list[str]:
    """Of 1 to 50 words, every third with the massive token first, every fifth with it later."""
    found = []
    for index in range(count):
        length = 1 + (index * 7) % 50
        at = 0 if index % 3 == 0 else length - 1 if index % 5 == 0 else None
        found.append(toys.text(length, x_at=at, seed=index))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": text, "kind": "even" if i % 2 == 0 else "odd"}) for i, text in enumerate(texts())]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def model():
    return toys.plant(toys.make("llama"), PLANTED)


MASK = melayer.WeMask(rate=0.5, layers=range(4, 8))


@pytest.fixture(scope="module")
def whole(model, corpus):
    """The corpus in batches of the usual size, to hold others against: plain, with int8, and with a mask beside it."""
    of = {"plain": {}, "int8": {"formats": ["int8"]}, "masked": {"formats": ["int8", "fp8"], "mask": MASK}}
    return {name: run(model, corpus, **options) for name, options in of.items()}


def run(model, corpus, tokenizer=None, **options):
    return scan(model, tokenizer or toys.tokenizer(), corpus, max_tokens=16, **options)


def exactly(result) -> dict:
    """What must be the same whatever the batches: counts and places, and what floats allow beside them."""
    total = result.to_dict()["total"]
    return {key: total[key] for key in ("documents", "sequences", "voting", "tokens", "me_layer", "holding",
                                        "n_massive", "massive", "n_massive_first", "n_massive_delimiters",
                                        "n_massive_words")}  # fmt: skip


def same(left, right, rtol=1e-5) -> None:
    assert exactly(left) == exactly(right)
    for mine, other in zip(left.total.places, right.total.places, strict=True):
        assert (mine.site, mine.layer, mine.n_values, mine.beyond_fp16) == (
            other.site, other.layer, other.n_values, other.beyond_fp16,
        )  # fmt: skip
        assert mine.max_abs == pytest.approx(other.max_abs, rel=rtol)
        assert mine.variance == pytest.approx(other.variance, rel=rtol)
        assert mine.kurtosis == pytest.approx(other.kurtosis, rel=rtol)
        assert mine.mean == pytest.approx(other.mean, abs=rtol * mine.variance**0.5)
        for share, value in mine.quantiles.items():
            assert value == pytest.approx(other.quantiles[share], rel=0.02)
        assert mine.interval == pytest.approx(other.interval, rel=0.02)
    for mine, other in zip(left.total.losses, right.total.losses, strict=True):
        assert mine.error == pytest.approx(other.error, rel=1e-3)


def test_figures_are_those_of_the_stored_activations(model, corpus):
    """One sequence a batch, each stored whole and summed up in the plainest way."""
    result = run(model, corpus, max_batch_tokens=1)
    decoder = wiring.read(model)
    tokenizer = toys.tokenizer()
    values: dict = {place: [] for place in result.total.census.places}
    n_sequences = n_tokens = 0
    holding = np.zeros(8, int)
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 16):
            row = Row(0, "", tuple(ids[start : start + 16]), (), 0, False)
            (given,) = batches([row])
            found, activations = stored(decoder, given, result.total.census.places)
            check(found, activations, given)
            n_sequences, n_tokens = n_sequences + 1, n_tokens + len(row)
            for place, x in activations.items():
                values[place].append(x[0].double().numpy())
            if len(row) >= 8:
                for layer in range(8):
                    h = activations["block_out", layer][0].abs()
                    holding[layer] += bool(((h > 100) & (h > 1000 * h.flatten().median())).any())
    assert (result.total.sequences, result.total.tokens) == (n_sequences, n_tokens)
    assert list(result.total.holding) == holding.tolist()
    for row in result.total.places:
        flat = np.concatenate(values[row.site, row.layer])
        assert row.max_abs == np.abs(flat).max()
        assert row.n_values == flat.size
        assert row.variance == pytest.approx(flat.var(), rel=1e-5)
        central = flat - flat.mean()
        assert row.kurtosis == pytest.approx((central**4).mean() / flat.var() ** 2, rel=1e-5)
        size = np.sort(np.abs(flat).ravel())
        for share, value in row.quantiles.items():
            exact = size[max(int(np.ceil(float(share) * size.size)) - 1, 0)]
            assert value == pytest.approx(exact, rel=0.01)
        by_dim = np.abs(flat).max(axis=0)
        assert [value for _, value in row.top_dims] == np.sort(by_dim)[::-1][:5].tolist()
        assert all(by_dim[dim] == value for dim, value in row.top_dims)


def test_the_planted_activation_is_found(whole):
    result = whole["plain"]
    row = next(row for row in result.total.places if (row.site, row.layer) == ("block_out", 3))
    assert (row.dim, row.token) == (7, "X")
    assert row.max_abs == pytest.approx(3000, rel=0.1)
    holders = [text for text in texts() if "X" in text.split()]
    assert result.total.n_massive_first + result.total.n_massive_words == len(holders)
    assert result.total.n_massive_first == sum(text.split()[0] == "X" for text in holders)
    assert [token.token for token in result.total.massive] == ["X"]
    assert result.total.n_massive[:3] == (0, 0, 0)
    assert result.total.documents == COUNT


def test_nothing_massive_is_a_result(corpus):
    result = run(toys.make("llama"), corpus)
    assert result.total.me_layer is None
    assert result.total.massive == ()
    assert "there is no ME layer; nothing would overflow float16" in result.sentence


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "mixtral", "gpt_oss", "qwen3_5"])
def test_other_families(family, corpus):
    result = scan(toys.plant(toys.make(family), PLANTED), toys.tokenizer(), corpus, limit=6, formats=["int8"])
    row = next(row for row in result.total.places if (row.site, row.layer) == ("block_out", 3))
    assert (row.dim, row.token) == (7, "X")


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
def test_the_size_of_a_batch_changes_nothing(model, corpus, whole, max_batch_tokens):
    options = {"formats": ["int8", "fp8"], "mask": MASK}
    same(whole["masked"], run(model, corpus, max_batch_tokens=max_batch_tokens, **options))


def test_the_order_of_the_documents_changes_nothing(model, corpus, whole, tmp_path):
    lines = Path(corpus).read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines[::-1]))
    same(whole["plain"], run(model, str(tmp_path / "corpus.jsonl")))


def test_categories_are_kept_apart_and_add_up(model, corpus, whole, tmp_path):
    result = run(model, Corpus(corpus, category="kind"))
    assert [part.name for part in result.categories] == ["even", "odd"]
    for part in result.categories:
        lines = [line for line in Path(corpus).read_text().splitlines() if json.loads(line)["kind"] == part.name]
        (tmp_path / "part.jsonl").write_text("\n".join(lines))
        alone = run(model, str(tmp_path / "part.jsonl")).total
        assert (part.tokens, part.n_massive, part.holding) == (alone.tokens, alone.n_massive, alone.holding)
        for mine, other in zip(part.places, alone.places, strict=True):
            assert mine.max_abs == pytest.approx(other.max_abs, rel=1e-5)
    same(result, whole["plain"])


def test_the_model_is_as_it_was(model, corpus, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, corpus, formats=["int8"], mask=MASK, limit=5)
    monkeypatch.setattr("melayer.census.worker.reconstruct", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, corpus, formats=["int8"], mask=MASK, limit=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_long_documents_are_cut_or_truncated(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{toys.text(40, x_at=0)}\n{toys.text(3, x_at=None)}\n")
    whole = run(model, str(path))
    assert (whole.total.documents, whole.total.sequences, whole.total.tokens) == (2, 4, 43)
    cut = run(model, str(path), truncate=True)
    assert (cut.total.documents, cut.total.sequences, cut.total.tokens) == (2, 2, 19)
    bos = run(model, str(path), bos=True)
    # Each of the 40-token document's windows begins with BOS, so that there are 15 tokens of its own in each.
    assert (bos.total.sequences, bos.total.tokens) == (4, 43 + 4)
    assert bos.total.census.seen[1].tolist() == [4, 0]


def test_under_a_mask_the_first_token_alone_changes(model, corpus, whole):
    """The mask acts on what attention reads: its effect is in attn_in of the masked blocks, the plain pass is plain."""
    mask = melayer.WeMask(rate=1.0, layers=range(4, 8))
    result = run(model, corpus, formats=["int8"], mask=mask)
    by_key = {(loss.site, loss.layer, loss.kind): loss.error for loss in whole["int8"].total.losses}
    changed = set()
    for loss in result.total.losses:
        if loss.variant == "plain":
            assert loss.error == by_key[loss.site, loss.layer, loss.kind]
        elif abs(loss.error - by_key[loss.site, loss.layer, loss.kind]) > 1e-6:
            changed.add(loss.layer)
    assert min(changed) >= 4


# --- interrupted ---------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 20])
def test_stopped_and_started_again_it_ends_with_the_same(model, corpus, whole, tmp_path, after):
    calls = 0

    def stop(done, total, note):
        nonlocal calls
        calls += 1
        if calls == after:
            raise StopError

    options = {"formats": ["int8"], "max_batch_tokens": 16, "store": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(StopError):
        run(model, corpus, progress=stop, **options)
    again = run(model, corpus, **options)
    same(whole["int8"], again)
    # A third run has nothing left to do.
    seen = []
    same(again, run(model, corpus, progress=lambda *given: seen.append(given), **options))
    assert seen == []


def test_what_is_left_out_is_counted_once_however_often_it_is_stopped(model, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": texts(12)}), path, row_group_size=4, compression="none")
    content = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    for after in range(1, 16):
        calls = []

        def stop(*given, calls=calls, after=after):
            calls.append(given)
            if len(calls) == after:
                raise StopError

        options = {"max_batch_tokens": 1, "checkpoint_seconds": 0, "store": tmp_path / str(after)}
        options["sites"] = ["block_out"]
        with pytest.raises(StopError):
            run(model, str(path), progress=stop, **options)
        result = run(model, str(path), **options)
        assert (result.total.documents, result.n_left_out) == (8, 4), after
        assert [found.index for found in result.left_out] == [4, 5, 6, 7]


def test_a_store_of_other_settings_is_refused(model, corpus, tmp_path):
    run(model, corpus, store=tmp_path, limit=3)
    with pytest.raises(
        InputError, match=r"holds a scan with other settings: bos \(None, now True\), limit \(3, now 4\)"
    ):
        run(model, corpus, store=tmp_path, limit=4, bos=True)
    with pytest.raises(InputError, match=r"other settings: model"):
        run(toys.make("llama", seed=1), corpus, store=tmp_path, limit=3)
    scan_state.path_of(tmp_path, 0).write_bytes(b"PK nothing")
    with pytest.raises(OutputError, match=r"scan.0.state was not written by melayer, so it is left as it is"):
        run(model, corpus, store=tmp_path, limit=3)
    assert scan_state.path_of(tmp_path, 0).read_bytes() == b"PK nothing"


@pytest.fixture(scope="module")
def kept(model, corpus, tmp_path_factory):
    """A scan's state, and its settings."""
    store = tmp_path_factory.mktemp("kept")
    run(model, Corpus(corpus, category="kind"), store=store, limit=4, sites=["block_out"], formats=["int8"])
    content = scan_state.path_of(store, 0).read_bytes()
    return content, scan_state.State.from_bytes(content).settings


@given(st.data())
def test_whatever_byte_is_changed_or_cut_no_figure_becomes_another(kept, tmp_path_factory, data):
    content, settings = kept
    directory = tmp_path_factory.getbasetemp() / "damaged scan"
    directory.mkdir(exist_ok=True)
    path, damage = scan_state.path_of(directory, 0), damaged(content, data)
    path.write_bytes(damage)
    try:
        found = scan_state.read(directory, settings)
    except MelayerError:
        assert path.read_bytes() == damage
        return
    assert found.to_bytes() == content


def test_a_state_whose_parts_are_not_what_they_should_be(kept, tmp_path):
    content, settings = kept
    with np.load(io.BytesIO(content)) as archive:
        arrays = dict(archive)
    about = json.loads(arrays["about"].tobytes())
    with np.load(io.BytesIO(arrays["census0"].tobytes())) as archive:
        census = dict(archive)

    def packed(of):
        file = io.BytesIO()
        np.savez(file, **of)
        return file.getvalue()

    def saying(**changed):
        return {**arrays, "about": np.frombuffer(json.dumps({**about, **changed}).encode(), np.uint8)}

    def counting(**changed):
        return {**arrays, "census0": np.frombuffer(packed({**census, **changed}), np.uint8)}

    cases = {
        "seconds: input should be a valid number": saying(seconds="3"),
        "shares.0.2: input should be a valid integer": saying(shares=[[0, 1, "4"]]),
        "its shares of the documents are none": saying(shares=[[1, 1, 4]]),
        "n_left_out: input should be a valid integer": saying(n_left_out=0.5),
        "it has fields that this version does not know": saying(more=1),
        "it has 3 parts for 1 categories": saying(categories=["even"]),
        "census2": saying(categories=["even", "odd", "third"]),
        "maxima is not what it should be": counting(maxima=census["maxima"].astype(np.float64)),
        "holding is not what it should be": counting(holding=census["holding"].astype(str)),
        "totals is not what it should be": counting(totals=census["totals"][:3]),
        "document_counts is not what it should be": counting(document_counts=census["document_counts"][:-1]),
    }
    path = scan_state.path_of(tmp_path, 0)
    for said, parts in cases.items():
        path.write_bytes(packed(parts))
        with pytest.raises(InputError, match=f"scan.0.state cannot be read as a scan's state: .*{said}"):
            scan_state.read(tmp_path, settings)
    # The first version's settings may have been fewer.
    del settings["formats"]
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds a scan with other settings: formats"):
        scan_state.read(tmp_path, settings)


@pytest.mark.parametrize("kind", stores.KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_what_others_put_there_stays(model, corpus, tmp_path, rank, kind):
    stores.KINDS[kind](scan_state.path_of(tmp_path, rank))
    before = stores.found(tmp_path)
    with pytest.raises(OutputError, match=rf"scan.{rank}.state (is|was not written by melayer)"):
        run(model, corpus, store=tmp_path, limit=3)
    assert stores.found(tmp_path) == before


def test_a_store_that_cannot_be_made_is_said(model, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"The scan cannot be kept in .*file: File exists"):
        run(model, corpus, store=tmp_path / "file", limit=3)


def test_a_full_disk_leaves_what_was_kept(model, corpus, tmp_path, monkeypatch):
    run(model, corpus, store=tmp_path, limit=3)
    kept = scan_state.path_of(tmp_path, 0).read_bytes()

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OutputError, match=r"cannot be kept in .*: No space left on device. What was kept before stands"
    ):
        run(model, corpus, store=tmp_path, limit=3)
    assert scan_state.path_of(tmp_path, 0).read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["scan.0.state"]


def test_a_name_that_is_not_utf_8_is_the_same_when_it_goes_on(model, tmp_path):
    path = tmp_path / "caf\udce9.txt"
    path.write_text("\n".join(texts(8)))
    options = {"sites": ["block_out"], "store": tmp_path / "out"}
    run(model, str(path), **options)
    again = run(model, str(path), progress=lambda *given: pytest.fail("counted again"), **options)
    write_scan_report(again, tmp_path / "page")
    values = json.loads((tmp_path / "page" / "report.json").read_text(encoding="utf-8"))
    assert "caf\\udce9" in values["scan"]["settings"]["data"]["source"]


# --- many processes ------------------------------------------------------------------------------------------------


ASKED = ("--max-tokens", "16")


def by_launcher(python, arguments):
    """Two processes of torch's own launcher, from nothing; what they print."""
    command = [python[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "melayer"]
    done = subprocess.run([*command, *map(str, arguments)], env=python[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def by_hand(tmp_path, arguments):
    """Four processes; what they print, one after the other."""
    said = [tmp_path / f"said {rank}" for rank in range(4)]
    with children.together(4) as environments:
        four = [
            children.started(children.command, *arguments, output=output, **environment)
            for output, environment in zip(said, environments, strict=True)
        ]
        for process, output in zip(four, said, strict=True):
            assert children.ended(process) == 0, children.errors_of(output).read_text()[-3000:]
    return "".join(output.read_text() for output in said)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_documents(python, toy_directory, corpus, tmp_path, size):
    out = tmp_path / "out"
    arguments = ("scan", toy_directory, "--data", corpus, *ASKED, "--out", out, "--formats", "int8", "--json")
    found = json.loads(by_launcher(python, arguments) if size == 2 else by_hand(tmp_path, arguments))
    loaded = melayer.load(str(toy_directory))
    alone = json.loads(json.dumps(run(loaded.model, corpus, loaded.tokenizer, formats=["int8"]).to_dict()))
    assert found["n_processes"] == size
    for key in ("documents", "sequences", "voting", "tokens", "holding", "n_massive", "massive"):
        assert found["total"][key] == alone["total"][key]
    for mine, other in zip(found["total"]["places"], alone["total"]["places"], strict=True):
        assert mine["n_values"] == other["n_values"]
        for key in ("max_abs", "variance", "kurtosis"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), (mine["site"], key)
    assert sorted(path.name for path in out.glob("scan.*")) == [f"scan.{rank}.state" for rank in range(size)]
    # What two or four processes have kept is enough for one.
    seen = []
    settings = {"formats": ["int8"], "store": out, "name": found["model"]["name"]}
    result = run(loaded.model, corpus, loaded.tokenizer, progress=lambda *given: seen.append(given), **settings)
    assert seen == []
    assert json.loads(json.dumps(exactly(result))) == {key: alone["total"][key] for key in exactly(result)}
    assert [path.name for path in out.glob("scan.*")] == ["scan.0.state"]


def test_what_was_taken_over_is_not_counted_twice(model, corpus, tmp_path):
    """Stopped after the first process has taken over what another kept, and before that was removed."""
    whole = run(model, corpus, store=tmp_path)
    state = scan_state.path_of(tmp_path, 0).read_bytes()
    scan_state.path_of(tmp_path, 1).write_bytes(state)
    assert exactly(run(model, corpus, store=tmp_path)) == exactly(whole)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_merging_in_pairs_reaches_the_first(size):
    """Each process' part of the tree, run in threads over queues in place of a network."""
    import queue
    import threading

    wires = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    class Wired(Group):
        def _send(self, value, to):
            wires[self.rank, to].put(value)

        def _receive(self, source):
            return wires[source, self.rank].get(timeout=children.PATIENCE)

    found = {}
    threads = [
        threading.Thread(target=lambda r=rank: found.update({r: Wired(r, size).reduced(b"%d" % r, lambda a, b: a + b)}))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found[0]) == sorted(b"".join(b"%d" % rank for rank in range(size)))
    assert all(found[rank] is None for rank in range(1, size))


def test_a_process_that_has_died_is_named(monkeypatch):
    def gone(*given, **options):
        raise RuntimeError("[gloo] Connection closed by peer\nand more")

    monkeypatch.setattr(torch.distributed, "recv", gone)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    with pytest.raises(
        ProcessError, match=r"Process 1 of 2 processes \(counted from 0\) no longer answers: .*Connection closed"
    ):
        Group(0, 2).reduced(b"", lambda a, b: a)


# A batch a sequence, and each few documents are kept.
BY_LITTLE = ("--max-batch-tokens", "1", "--checkpoint-seconds", "0")


def killed_scan(when, *arguments):
    """A scan from the command line that dies once it has kept something twice, or over the second time."""
    write, kept = scan_state.write, []

    def writing(directory, rank, state):
        kept.extend([1] if state.shares else [])
        if len(kept) == 2 and when == "while it writes":
            # All of it is on the disk under another name.
            Path.replace = lambda *_: children.kill()
        write(directory, rank, state)
        if len(kept) == 2 and when == "after it wrote":
            children.kill()
        if len(kept) == 2 and when == "while it measures":
            worker.observe = lambda *_: children.kill()

    scan_state.write = writing
    children.command(*arguments)


def test_when_a_worker_dies_the_others_say_so_and_what_was_kept_stands(toy_directory, corpus, tmp_path):
    out, said = tmp_path / "out", [tmp_path / f"said {rank}" for rank in (0, 1)]
    arguments = ("scan", toy_directory, "--data", corpus, *ASKED, *BY_LITTLE, "--out", out, "--sites", "block_out")
    with children.together(2) as environments:
        first = children.started(children.command, *arguments, output=said[0], **environments[0])
        second = children.started(killed_scan, "after it wrote", *arguments, output=said[1], **environments[1])
        assert children.ended(second) == -signal.SIGKILL
        assert children.ended(first) == 2
    told = " ".join(children.errors_of(said[0]).read_text().split())
    assert "melayer: Process 1 of 2 processes (counted from 0) no longer answers: it has died" in told
    for rank in (0, 1):
        assert scan_state.State.from_bytes(scan_state.path_of(out, rank).read_bytes()).shares


def test_ended_by_its_launcher_it_says_what_stands(toy_directory, corpus, tmp_path, monkeypatch):
    write, before = scan_state.write, signal.getsignal(signal.SIGTERM)

    def writing(directory, rank, state):
        write(directory, rank, state)
        if state.shares:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(scan_state, "write", writing)
    said = failing("scan", toy_directory, "--data", corpus, *ASKED, *BY_LITTLE, "--out", tmp_path)
    told = "Stopped by SIGTERM, as launchers send it when another process has died: what was kept in"
    assert f"{told} {tmp_path} stands" in said
    assert signal.getsignal(signal.SIGTERM) == before
    assert scan_state.State.from_bytes(scan_state.path_of(tmp_path, 0).read_bytes()).shares


def test_killed_while_it_measures_and_while_it_writes(toy_directory, corpus, tmp_path):
    out = tmp_path / "out"
    arguments = ("scan", toy_directory, "--data", corpus, *ASKED, *BY_LITTLE, "--sites", "block_out,ffn_act")
    arguments += ("--json", "--out", out)
    done = []
    for when in ("after it wrote", "while it writes", "while it measures"):
        assert children.ended(children.started(killed_scan, when, *arguments)) == -signal.SIGKILL
        kept = scan_state.State.from_bytes(scan_state.path_of(out, 0).read_bytes())
        done.append(kept.shares[0, 1].until)
        # What the second one left is gone with the third one's first write.
        assert bool(list(out.glob(".melayer-*"))) == (when == "while it writes")
    assert 0 < done[0] <= done[1] < done[2] < COUNT
    last = melayer_command(*arguments)
    assert last.exit_code == 0, last.output
    loaded = melayer.load(str(toy_directory))
    alone = run(loaded.model, corpus, loaded.tokenizer, sites=["block_out", "ffn_act"])
    total = json.loads(last.stdout)["total"]
    assert {key: total[key] for key in exactly(alone)} == json.loads(json.dumps(exactly(alone)))
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "scan.0.state"]


def scan_killed_at(point, *arguments):
    """A scan from the command line that dies at this point: a batch, or before or after something of its directory."""
    passed = 0

    def counted(function):
        def counting(*given, **options):
            nonlocal passed
            for place in ("before", "after"):
                passed += 1
                if passed == point:
                    children.kill()
                if place == "before":
                    found = function(*given, **options)
            return found

        return counting

    worker.observe = counted(worker.observe)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    children.command(*arguments)


@pytest.mark.parametrize("seed", range(3))
def test_two_processes_killed_anywhere_end_with_the_same(toy_directory, corpus, tmp_path, seed):
    """One of them or both, three times over, and then neither."""
    drawn, out = random.Random(seed), tmp_path / "out"
    arguments = ("scan", toy_directory, "--data", corpus, *ASKED, *BY_LITTLE, "--sites", "block_out,ffn_act")
    arguments += ("--category", "kind", "--json", "--out", out)
    for round in range(4):
        # Each of 40 documents passes some four points: what is killed early, and what has nearly finished.
        points = [drawn.choice([drawn.randint(1, 60), None]) if round < 3 else None for _ in range(2)]
        if round < 3 and points == [None, None]:
            points[drawn.randrange(2)] = drawn.randint(1, 20)
        said = [tmp_path / f"said {round} {rank}" for rank in range(2)]
        with children.together(2) as environments:
            two = [
                children.started(scan_killed_at, point, *arguments, output=output, **environment)
                for point, output, environment in zip(points, said, environments, strict=True)
            ]
            codes = [children.ended(process) for process in two]
        # Who is not killed ends well, or says that the other one is gone.
        assert all(code in (0, 2, -signal.SIGKILL) for code in codes), (codes, children.errors_of(said[0]).read_text())
        assert round or -signal.SIGKILL in codes
    assert codes == [0, 0]
    found = json.loads(said[0].read_text())
    loaded = melayer.load(str(toy_directory))
    options = {"sites": ["block_out", "ffn_act"], "max_batch_tokens": 1}
    alone = run(loaded.model, Corpus(corpus, category="kind"), loaded.tokenizer, **options).to_dict()
    for part, other in zip([found["total"], *found["categories"]], [alone["total"], *alone["categories"]], strict=True):
        part, other = json.loads(json.dumps(part)), json.loads(json.dumps(other))
        rows, others = part.pop("places"), other.pop("places")
        assert part == other
        for row, its in zip(rows, others, strict=True):
            for moment in ("mean", "variance", "kurtosis"):  # sums of float64, added in another order
                assert row.pop(moment) == pytest.approx(its.pop(moment), rel=1e-9)
            assert row == its
    assert not list(out.glob(".melayer-*"))


# --- what texts bring, and how long they are --------------------------------------------------------------------------


def lines(path, *given):
    path.write_text("".join(f"{line}\n" for line in given))
    return str(path)


@pytest.mark.parametrize("bos", [None, True])
def test_bos_that_a_text_brings_is_not_doubled(model, tmp_path, bos):
    tokenizer = toys.beginning_tokenizer() if bos is None else toys.tokenizer()
    plain = run(model, lines(tmp_path / "plain.txt", *texts(6)), tokenizer, bos=bos)
    with pytest.warns(MelayerWarning, match=r"6 documents bring the begin-of-sequence token \(<s>\) themselves"):
        brought = run(model, lines(tmp_path / "own.txt", *(f"<s> {text}" for text in texts(6))), tokenizer, bos=bos)
    same(plain, brought)
    seen = {token.token: token.seen_first for token in plain.total.massive}
    assert plain.total.census.seen[1].tolist() == [plain.total.sequences, 0], seen


def test_a_document_that_is_bos_alone_is_one_token(model, tmp_path):
    with pytest.warns(MelayerWarning, match="1 documents bring"):
        result = run(model, lines(tmp_path / "a.txt", "<s>", "w1 w2"), toys.tokenizer())
    assert (result.total.sequences, result.total.tokens) == (2, 3)


def test_long_documents_are_read_in_pieces_and_portions(model, tmp_path, monkeypatch):
    path = lines(tmp_path / "a.txt", *texts(4), toys.text(3000, x_at=7, seed=9), toys.text(900, x_at=None, seed=10))
    whole = run(model, path)
    monkeypatch.setattr("melayer.data.tokens.PIECE", 300)
    pieces = run(model, path, max_batch_tokens=16)  # many portions, too
    same(whole, pieces)
    assert pieces.total.documents == 6
    first = run(model, path, truncate=True)
    assert first.total.sequences == 6
    monkeypatch.undo()
    same(first, run(model, path, truncate=True))


def test_a_document_with_a_token_that_the_model_lacks_is_left_out(tmp_path):
    model = toys.plant(toys.make("llama"), PLANTED)
    tokenizer = toys.tokenizer()
    tokenizer.add_tokens(["beyond"])
    result = run(model, lines(tmp_path / "a.txt", *texts(3), "w1 beyond w2", "w3"), tokenizer)
    assert (result.total.documents, result.n_left_out) == (4, 1)
    assert result.left_out[0].reason == "gives the token 64, and the model has tokens 0 to 63"


@pytest.mark.parametrize("name", corpora.TEXTS)
def test_hostile_corpora(model, tmp_path, name):
    """Scanned to the end, or refused; what is left out is the same however often the scan was stopped."""
    path = corpora.TEXTS[name](tmp_path)
    good = corpora.GOOD[name]
    options = {"sites": ["block_out"], "max_batch_tokens": 16, "truncate": True}
    if not good:
        with pytest.raises(InputError):
            run(model, str(path), **options)
        return
    result = run(model, str(path), **options)
    assert result.total.documents == good
    json.dumps(result.to_dict(), allow_nan=False).encode("utf-8")
    for after in (1, 3):
        calls = []

        def stop(*given, calls=calls, after=after):
            calls.append(given)
            if len(calls) == after:
                raise StopError

        kept = {**options, "checkpoint_seconds": 0, "store": tmp_path / f"store {after}"}
        with contextlib.suppress(StopError):
            run(model, str(path), progress=stop, **kept)
        again = run(model, str(path), **kept)
        same(result, again)
        assert (again.n_left_out, again.left_out, again.notes) == (result.n_left_out, result.left_out, result.notes)


def test_categories_beyond_a_number_are_together(model, tmp_path):
    path = tmp_path / "a.jsonl"
    names = [f"k{place % 5}" for place in range(20)]
    rows = [json.dumps({"text": text, "kind": kind}) for text, kind in zip(texts(20), names, strict=True)]
    path.write_text("\n".join(rows))
    apart = run(model, Corpus(str(path), category="kind"))
    assert [part.name for part in apart.categories] == ["k0", "k1", "k2", "k3", "k4"]
    assert not any("categories" in note for note in apart.notes)
    few = run(model, Corpus(str(path), category="kind", max_categories=2))
    assert [(part.name, part.documents) for part in few.categories] == [("(other)", 12), ("k0", 4), ("k1", 4)]
    assert any(note.startswith("The first 2 categories in the order of the corpus have figures") for note in few.notes)
    same(apart, few)
    # Also where it was stopped, and goes on.
    calls = []

    def stop(*given):
        calls.append(given)
        if len(calls) == 3:
            raise StopError

    options = {"checkpoint_seconds": 0, "store": tmp_path / "store", "max_batch_tokens": 16}
    with pytest.raises(StopError):
        run(model, Corpus(str(path), category="kind", max_categories=2), progress=stop, **options)
    again = run(model, Corpus(str(path), category="kind", max_categories=2), **options)
    assert [(part.name, part.documents) for part in again.categories] == [("(other)", 12), ("k0", 4), ("k1", 4)]
    with pytest.raises(InputError, match="holds a scan with other settings: data"):
        run(model, Corpus(str(path), category="kind", max_categories=3), **options)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_documents_are_counted_named_and_skipped(model, tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}) for text in texts(6)]
    path.write_text("\n".join([good[0], "{", *good[1:3], json.dumps({"text": 5}), *good[3:]]))
    result = run(model, str(path))
    assert (result.total.documents, result.n_left_out) == (6, 2)
    assert [found.index for found in result.left_out] == [1, 4]
    assert result.notes[0] == "a.jsonl is read as JSON lines, its texts from the column 'text'."
    assert result.notes[1].startswith("Documents left out: 2: document 1 (a.jsonl, line 2: no JSON: Expecting property")
    assert result.notes[1].endswith("; document 4 (a.jsonl, line 5: its text is a number and no string).")
    clean = tmp_path / "b.jsonl"
    clean.write_text("\n".join(good))
    assert exactly(run(model, str(clean))) == exactly(result)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sites": ["blocks"]}, r"The site 'blocks' is not known; expected some of embedding"),
        ({"sites": []}, r"No site was given"),
        ({"formats": ["int3"]}, r"The format 'int3' is not known; expected some of int8, int4, fp8"),
        ({"mask": melayer.WeMask(layers=(4,))}, r"A mask was given, but no format"),
        ({"limit": 0}, r"limit is 0; expected at least 1 document"),
        ({"max_tokens": 1}, r"max_tokens is 1; expected at least 2"),
        ({"max_tokens": 300}, r"300 tokens were asked for, but the model has 256 positions"),
    ],
)
def test_options_that_make_no_measurement(model, corpus, options, said):
    with pytest.raises(InputError, match=said):
        scan(model, toys.tokenizer(), corpus, **options)


def test_a_model_split_over_processes_is_refused(corpus):
    model = toys.make("llama")
    model._tp_size = 2  # what transformers sets when it loads with a tp plan
    with pytest.raises(InputError, match=r"The model is split over processes \(tensor parallelism\)"):
        run(model, corpus)


def test_an_empty_corpus(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"a.txt holds no document"):
        run(model, str(path))
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": " "}')
    with pytest.raises(InputError, match=r"No document of .* can be measured: 2 were left out, .* has no text"):
        run(model, str(tmp_path / "b.jsonl"))


def test_sequences_too_short_to_vote_are_said(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\nX\n")
    result = run(model, str(path))
    assert result.total.me_layer is None
    assert result.total.voting == 0
    assert any("not meaningful" in note for note in result.notes)


def test_a_model_that_overflows_says_where(corpus):
    model = toys.plant(toys.make("llama"), [(3, 7, 1e5)]).half()
    result = run(model, corpus)
    assert "holds NaN or infinity in float16" in result.sentence
    json.dumps(result.to_dict(), allow_nan=False)


def test_values_beyond_float16_are_counted(corpus):
    result = run(toys.plant(toys.make("llama"), [(3, 7, 1e5)]), corpus)
    beyond = {(row.site, row.layer): row.beyond_fp16 for row in result.total.places}
    holders = sum("X" in text.split() for text in texts())
    assert [beyond["block_out", layer] for layer in range(8)] == [0, 0, 0] + [holders] * 5
    assert f"{sum(beyond.values())} values would overflow float16" in result.sentence


def test_sites_are_known_by_their_names():
    assert SITES == (
        "embedding", "attn_in", "q", "k", "v", "attn_act", "attn_out", "ffn_in", "ffn_act", "ffn_out", "block_out",
        "final_norm",
    )  # fmt: skip


@pytest.mark.demo
def test_the_demo_model(demo, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "My favorite color is Dark Blue. The sky is clear today.\nOne two three four five six seven eight.\n"
    )
    result = scan(demo.model, demo.tokenizer, str(path))
    assert result.total.me_layer == 11
    row = max(result.total.places, key=lambda row: row.max_abs or 0)
    assert (row.site, row.layer, row.dim, row.token_index) == ("block_out", 11, 507, 0)
    located = melayer.locate(demo.model, demo.tokenizer, texts=path.read_text().splitlines())
    for block in located.blocks:
        mine = next(row for row in result.total.places if (row.site, row.layer) == ("block_out", block.layer))
        assert mine.max_abs == pytest.approx(block.max_abs, rel=1e-4)
