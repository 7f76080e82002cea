"""The protections, each taken away: (what, file, text, what stands there instead, the tests of which one must fail).

`test_mutants.py` makes each change in a copy of the repository and runs the tests there. A text that is not found exactly once
is an error, so that the list cannot outlive the code it is about.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    what: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


FAULTS = "tests/faults/test_"
FILES, WRITING, SHARDS = "sami_cache/store/files.py", "sami_cache/store/writing.py", "sami_cache/store/shards.py"
CREATION, INTEGRITY, COMMITS = "sami_cache/store/creation.py", "sami_cache/store/integrity.py", "sami_cache/store/commits.py"
OBJECTS, COPIES = "sami_cache/store/objects.py", "sami_cache/store/local_copies.py"
LOADER, TRAINING, IMAGES = "sami_cache/loader.py", "sami_cache/training.py", "sami_cache/data/images.py"
POWER_CUT, DURABILITY = f"{FAULTS}power_cut.py", "tests/test_durability.py"
KILLS, FLIPS, DAMAGE = f"{FAULTS}kills.py", f"{FAULTS}bit_flips.py", f"{FAULTS}damage.py"
HOSTILE, IDENTITY, WORKERS = f"{FAULTS}hostile_inputs.py", f"{FAULTS}identity.py", f"{FAULTS}data_workers.py"
OBJECT_TESTS = "tests/test_objects.py"
TRAINING_KILLS, SIGNALS, EXTRACTORS = f"{FAULTS}training_kills.py", f"{FAULTS}signals.py", f"{FAULTS}many_extractors.py"

MUTANTS = (
    # What is on disk survives a power cut.
    Mutant(
        "a file's bytes are not flushed",
        FILES,
        "        os.fsync(descriptor)\n    except OSError",
        "    except OSError",
        (POWER_CUT,),
    ),
    Mutant(
        "a file's name is not flushed",
        FILES,
        "    fsync_directory(path.parent)\n    return made",
        "    return made",
        (POWER_CUT,),
    ),
    Mutant(
        "a new cache's name is not flushed",
        CREATION,
        "                fsync_directory(folder)\n    finally:",
        "                pass\n    finally:",
        (POWER_CUT, DURABILITY),
    ),
    Mutant(
        "a new cache's inner names are not flushed",
        CREATION,
        "reverse=True):\n                fsync_directory(folder)",
        "reverse=True):\n                pass",
        (DURABILITY,),
    ),
    Mutant(
        "a file moved aside is not flushed",
        FILES,
        "    for folder in (directory.parent, directory, path.parent):\n        fsync_directory(folder)\n",
        "",
        (DURABILITY,),
    ),
    Mutant(
        "errors of a flush pass unseen",
        FILES,
        "        os.fsync(descriptor)\n    except",
        "        try:\n            os.fsync(descriptor)\n        except OSError:\n            pass\n    except",
        (DURABILITY, KILLS),
    ),
    # What is committed is never replaced, lost or mixed.
    Mutant(
        "an existing file is written over (no O_EXCL)",
        FILES,
        "os.O_CREAT | os.O_EXCL",
        "os.O_CREAT | os.O_TRUNC",
        (DURABILITY,),
    ),
    Mutant(
        "a name that is taken is taken over",
        FILES,
        "            os.link(temporary, path)\n",
        "            os.replace(temporary, path)\n            temporary.touch()\n",
        (KILLS, EXTRACTORS),
    ),
    Mutant(
        "the record comes before the files",
        WRITING,
        "        mine, codes, checksums =",
        "        publish(cache.record_path(shard), b'{}', cache.path / 'tmp')\n        mine, codes, checksums =",
        (KILLS,),
    ),
    Mutant(
        "a committed shard is written again",
        WRITING,
        "    if exists(cache.record_path(shard)):\n        raise _Overtaken",
        "    pass",
        ("tests/test_writing.py",),
    ),
    Mutant(
        "the winner does not look again", WRITING, "    if won or known.displaced:", "    if False:", ("tests/test_writing.py",)
    ),
    Mutant(
        "what was written is not read back",
        WRITING,
        "            if data != packed or np.array_equal(stored, codes):",
        "            if True:",
        ("tests/test_writing.py",),
    ),
    Mutant(
        "folders that are links are written through",
        FILES,
        "        if not stat.S_ISDIR(folder.lstat().st_mode):",
        "        if False:",
        ("tests/test_writing.py",),
    ),
    Mutant(
        "a cache is built in place",
        CREATION,
        '    building = path.parent / f".{path.name}.{secrets.token_hex(8)}"',
        "    building = path",
        ("tests/test_cache.py",),
    ),
    # In an object store.
    Mutant(
        "an object is put over whatever is there",
        OBJECTS,
        '    mode: Any = "create" if version is None else version',
        '    mode: Any = "overwrite"',
        (OBJECT_TESTS,),
    ),
    Mutant(
        "an object is replaced whatever it is by now",
        OBJECTS,
        '    mode: Any = "create" if version is None else version',
        '    mode: Any = "create" if version is None else "overwrite"',
        (OBJECT_TESTS,),
    ),
    Mutant(
        "a put whose answer was lost is taken for another's",
        OBJECTS,
        "            return found == mark",
        "            return False",
        (OBJECT_TESTS,),
    ),
    Mutant(
        "a cache's head does not come last",
        CREATION,
        "    for name in (*sorted(STATIC_FILES), HEAD):",
        "    for name in (HEAD, *sorted(STATIC_FILES)):",
        (OBJECT_TESTS,),
    ),
    Mutant(
        "a local copy is not checked when it comes",
        COPIES,
        "        if found == (size, digest):",
        "        if True:",
        (OBJECT_TESTS,),
    ),
    Mutant(
        "a local copy is not checked when it is used again",
        COPIES,
        "        return hasher.hexdigest() == digest",
        "        return True",
        (OBJECT_TESTS,),
    ),
    # What is read is what was committed.
    Mutant(
        "the seal of JSON is not checked by verify",
        FILES,
        '    if seal is None or digest(b"{" + data[seal.end() :]) != seal[1].decode():',
        "    if seal is None:",
        (FLIPS,),
    ),
    Mutant(
        "the seal of JSON is not checked by readers",
        FILES,
        "    return isinstance(value, dict) and seal(",
        "    return isinstance(value, dict) or seal(",
        (FLIPS,),
    ),
    Mutant(
        "the chunk's crc32c is not checked",
        SHARDS,
        "    if crc32c(packed) != _CRC_OF_WHOLE or",
        "    if",
        (FLIPS,),
    ),
    Mutant(
        "the record's crc32c of the chunk is not checked",
        SHARDS,
        ' or int.from_bytes(packed[-4:], "little") != checksum:',
        ":",
        (DAMAGE,),
    ),
    Mutant(
        "the index's crc32c is not checked", SHARDS, 'or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little")', "", (FLIPS,)
    ),
    Mutant(
        "the shard's size is not checked by readers",
        FILES,
        "        if actual != size:",
        "        if False:",
        ("tests/test_shards.py", "tests/test_integrity.py"),
    ),
    Mutant("sizes are not checked by verify", INTEGRITY, "        if size != entry.size:", "        if False:", (DAMAGE,)),
    Mutant("the bytes of shards are not checked by verify", INTEGRITY, "    if found != expected:", "    if False:", (FLIPS,)),
    Mutant(
        "the image's crc32c is not checked",
        "sami_cache/store/images.py",
        "        if crc32c(data) != checksum:",
        "        if False:",
        (FLIPS,),
    ),
    Mutant(
        "records are not compared with the manifest's by verify",
        INTEGRITY,
        "    if sealed.records and sealed.records[shard] != outline.digest:",
        "    if False:",
        (DAMAGE,),
    ),
    Mutant(
        "records are not compared with the manifest's by readers",
        "sami_cache/samples.py",
        "        if record.digest != self._digests[shard]:",
        "        if False:",
        (DAMAGE,),
    ),
    Mutant(
        "files that belong to no shard are not found",
        INTEGRITY,
        "        if report.sealed:\n            report.findings",
        "        if False:\n            report.findings",
        (DAMAGE,),
    ),
    Mutant(
        "the copies are not checked",
        INTEGRITY,
        '            if not entry.describes(copies.get(name, b"")):',
        "            if False:",
        ("tests/test_spare.py", FLIPS),
    ),
    Mutant(
        "a copy is put back without a look",
        "sami_cache/store/repair.py",
        'cache.files[name].describes(copies.get(name, b""))',
        "name in copies",
        ("tests/test_spare.py",),
    ),
    # What goes in is what was asked for.
    Mutant(
        "NaN and infinity are stored",
        WRITING,
        "~(np.isfinite(low) & np.isfinite(high) & (low < high))",
        "~(low != high)",
        ("tests/test_writing.py",),
    ),
    Mutant(
        "other settings are accepted",
        "pipelines/jobs.py",
        "        existing.check_identity(job.identity)",
        "        pass",
        (IDENTITY,),
    ),
    Mutant(
        "edited images are accepted",
        "pipelines/extract.py",
        "if job.cache is not None and not config.trust_images:",
        "if False:",
        (IDENTITY,),
    ),
    Mutant(
        "repair takes edited images",
        "pipelines/verify.py",
        "    check_images(cache, job.source, _sources_of",
        "    (lambda *a, **b: 0)(cache, job.source, _sources_of",
        ("tests/test_verify.py",),
    ),
    # Files from elsewhere.
    Mutant(
        "pickles are run", "sami_cache/models/weights.py", "weights_only=True, mmap", "weights_only=False, mmap", (HOSTILE,)
    ),
    Mutant(
        "the digest of weights is not checked",
        "sami_cache/models/weights.py",
        "    if found != expected.lower():",
        "    if False:",
        ("tests/test_teachers.py",),
    ),
    Mutant(
        "pipes and devices are waited for",
        "sami_cache/data/source.py",
        "os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)\n    if not stat.S_ISREG(os.fstat(descriptor).st_mode):",
        "os.O_RDONLY)\n    if False:",
        ("tests/test_sources.py",),
    ),
    Mutant("bombs are decoded", IMAGES, "    if width * height > limit:", "    if False:", ("tests/test_images.py",)),
    Mutant(
        "a footer's rows are believed",
        "sami_cache/data/parquet_source.py",
        "or footer.num_rows > size:",
        "and False:",
        ("tests/test_sources.py", HOSTILE),
    ),
    # Training.
    Mutant(
        "the generator is not seeded at every step",
        TRAINING,
        "        torch.manual_seed(int(np.random",
        "        (lambda seed: seed)(int(np.random",
        (TRAINING_KILLS,),
    ),
    Mutant(
        "a checkpoint is written in place",
        "sami_cache/checkpoints.py",
        '    final, unfinished = checkpoint_path(folder, step), folder / f"{_UNFINISHED}{step:08d}"',
        "    final = unfinished = checkpoint_path(folder, step)",
        (TRAINING_KILLS,),
    ),
    Mutant(
        "the optimizer is not restored",
        TRAINING,
        "            self.optimizer.load_named_state(checkpoint.optimizer)",
        "            pass",
        (TRAINING_KILLS,),
    ),
    Mutant(
        "an evaluation that a kill cut off is forgotten",
        TRAINING,
        "            if self._owes_a_line():",
        "            if self.step == 0 and self.config.evaluate_every:",
        ("tests/test_training.py", TRAINING_KILLS),
    ),
    Mutant(
        "a batch is handed out before its codes are there",
        LOADER,
        "len(pieces) + (len(numbers) if samples.codes_shape else 0)",
        "len(pieces)",
        ("tests/test_loader_reads.py",),
    ),
    Mutant(
        "a shard has recorded views if its first sample has one",
        "sami_cache/samples.py",
        "views=None if self.whole else",
        "views=None if record.samples[0].view is None else",
        ("tests/test_loader.py",),
    ),
    Mutant(
        "each rank takes samples of every shard",
        "sami_cache/order.py",
        "np.sort(order[: steps * batch_size].reshape(steps, batch_size), axis=1)",
        "order[: steps * batch_size].reshape(steps, batch_size)",
        ("tests/test_order.py",),
    ),
    Mutant(
        "a stuck worker is waited for",
        LOADER,
        "            if waited >= timeout:",
        "            if False:",
        (WORKERS,),
    ),
    Mutant(
        "a worker's end has no name",
        "sami_cache/workers.py",
        "            except BaseException as error:",
        "            except ValueError as error:",
        ("tests/test_workers.py",),
    ),
    Mutant(
        "the grace has no end",
        "sami_cache/processes.py",
        "            self._timer.start()\n",
        "",
        (SIGNALS, "tests/test_processes.py"),
    ),
    Mutant(
        "a signal is an error among others",
        "sami_cache/errors.py",
        "class Interrupted(BaseException):",
        "class Interrupted(SamiCacheError):",
        ("tests/test_processes.py",),
    ),
)
