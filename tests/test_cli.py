"""The commands as a user types them, in a directory of his own: what they print, where they write, how they exit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from photos import photo_folder
from typer.testing import CliRunner

from cli.main import app, main

SMALL = ["--grid", "14", "--shard-samples", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with data/, and a cache and a run made by the three commands with nothing but names."""
    home = tmp_path_factory.mktemp("cli")
    photo_folder(home / "data", 40)
    (home / "data" / "bad.png").write_bytes(b"not a picture")
    return home


def run(home: Path, *arguments: str, capsys=None, **env: str) -> tuple[int, str, str]:
    """Run `sami-cache ARGUMENTS` in `home`; (exit code, standard output, standard error)."""
    previous, old_argv = Path.cwd(), sys.argv
    saved = {name: os.environ.get(name) for name in env}
    os.chdir(home)
    os.environ.update(env)
    sys.argv = ["sami-cache", *arguments]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(previous)
        sys.argv = old_argv
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_summary_says_what_saturated_and_that_the_sample_was_too_small(tmp_path, capsys):
    """Thirty pictures of one grey, on which no codec can be fitted for the ten others, which are photographs."""
    from photos import pieces

    from sami_cache.store.files import digest

    names = sorted((f"{index:03d}.png" for index in range(40)), key=lambda name: digest(name.encode()))
    (tmp_path / "data").mkdir()
    for number, (name, piece) in enumerate(zip(names, pieces(40), strict=True)):
        flat = piece.resize((1, 1)).resize(piece.size).point(lambda value: 120 + value // 16)
        (piece if number >= 16 else flat).save(tmp_path / "data" / name)
    extract = ["extract", "--teacher", "efficientnet_lite0", *SMALL, "--error", "0.001", "--fit-images", "16"]
    code, out, err = run(tmp_path, *extract, capsys=capsys)
    assert code == 0, err
    assert re.search(r"error +\d+\.\d+% of the variance \(asked for 0\.10%\); \d+ coefficients clipped in \d+ samples", out)
    assert "The codec was fitted on 16 samples, which say too little about the others: a larger --fit-images" in out
    code, out, err = run(tmp_path, *extract[:-1], "40", "--cache", "better.zarr", capsys=capsys)
    assert code == 0, err
    assert "--fit-images" not in out
    assert "clipped" not in out


def test_the_three_commands(home, capsys):
    """extract, verify, train in a directory that holds data/: the defaults find it, the cache and the run."""
    code, out, err = run(home, "extract", "--teacher", "efficientnet_lite0", *SMALL, capsys=capsys)
    assert code == 0, err
    assert "cache.zarr: 40 of 41 samples in 3 shards, sealed." in out
    assert "bad.png: not an image" in out
    assert re.search(r"error +[01]\.\d{3}% of the variance \(asked for 1\.00%\)", out)
    assert "--fit-images" not in out
    assert "Next: sami-cache verify, then sami-cache train --student vit_s" in out
    assert "images/s" in err
    code, out, _ = run(home, "verify", capsys=capsys)
    assert code == 0
    assert "cache.zarr: clean (41 samples in 3 shards" in out
    assert "not checked: whether the codes decode" in out
    code, out, err = run(home, "train", "--student", "vit_s", "--steps", "1", "--decoder-depth", "1", capsys=capsys)
    assert code == 0, err
    assert (home / "runs" / "vit_s" / "checkpoints").is_dir()
    assert "Next: sami-cache export runs/vit_s" in out
    code, out, _ = run(home, "export", "runs/vit_s", capsys=capsys)
    assert code == 0
    assert "vit_small_patch16_224" in out
    code, out, _ = run(home, "inspect", capsys=capsys)
    assert "40 usable, 1 failed, 0 missing" in out


def test_environment_variables_are_the_defaults(home, capsys, tmp_path):
    code, out, _ = run(tmp_path, "verify", "--quick", "--json", capsys=capsys, SAMI_CACHE=str(home / "cache.zarr"))
    assert code == 0
    assert json.loads(out)["clean"] is True
    plan = ["extract", "--teacher", "efficientnet_lite0", "--plan", "--json", *SMALL]
    code, out, _ = run(tmp_path, *plan, capsys=capsys, SAMI_DATA=str(home / "data"))
    told = json.loads(out)
    assert (code, told["images"], told["fits"]) == (0, 41, True)
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_exit_codes(home, capsys, tmp_path):
    shutil.copytree(home / "cache.zarr", tmp_path / "cache.zarr")
    assert run(tmp_path, "verify", "--cache", "absent.zarr", capsys=capsys)[0] == 2
    shard = tmp_path / "cache.zarr" / "codes" / "1.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = run(tmp_path, "verify", capsys=capsys)
    assert code == 1
    assert "codes/1.0.0.0" in out
    assert "sami-cache verify --repair" in out
    code, out, _ = run(tmp_path, "verify", "--json", capsys=capsys)
    assert code == 1
    assert json.loads(out)["report"]["findings"][0]["path"] == "codes/1.0.0.0"
    code, out, _ = run(tmp_path, "diff", str(home / "cache.zarr"), str(home / "cache.zarr"), capsys=capsys)
    assert (code, out) == (0, "the same: equal roots.\n")
    code, _, err = run(tmp_path, "verify", "--quick", "--deep", capsys=capsys)
    assert (code, err) == (2, "sami-cache: --quick and --deep exclude each other.\n")
    code, out, err = run(tmp_path, "verify", "--repair", "--weights", "random", capsys=capsys)
    assert code == 2
    assert "teacher.weights_sha256" in err


def test_missing_weights_say_what_to_do(home, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "no-hub"))
    code, _, err = run(home, "extract", "--teacher", "vit_h", "--cache", "h.zarr", capsys=capsys)
    assert code == 2
    assert "sam_vit_h_4b8939.pth" in err
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in err
    assert "sami-cache extract --teacher vit_h --weights sam_vit_h_4b8939.pth" in err
    assert not (home / "h.zarr").exists()


def test_mistakes_are_explained_without_a_traceback(home, capsys, tmp_path):
    code, _, err = run(tmp_path, "extract", "--teacher", "efficientnet_lite0", capsys=capsys)
    assert code == 2
    assert "SAMI_DATA" in err
    code, _, err = run(home, "extract", "--teacher", "efficientnet_lite_0", "--cache", "x.zarr", capsys=capsys)
    assert code == 2
    assert "unknown teacher" in err
    assert "efficientnet_lite0" in err
    code, _, err = run(home, "extract", "--teacher", "efficientnet_lite0", "--grid", "13", capsys=capsys)
    assert code == 2
    assert "grid: the cache has 14, you ask for 13" in err
    code, _, err = run(home, "train", "--student", "vit_x", "--run", "runs/x", "--steps", "1", capsys=capsys)
    assert code == 2
    assert "expected one of vit_t, vit_s, vit_b" in err
    assert not (home / "runs" / "x").exists()
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["extract", "verify", "diff", "inspect", "train", "export", "report", "demo"])
def test_every_help_shows_an_example(command):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert f"sami-cache {command}" in text
    assert "Example" in text


def test_a_crash_of_ours_is_not_called_damage(monkeypatch, capsys, tmp_path):
    import pipelines.verify

    monkeypatch.setattr(pipelines.verify, "verify", lambda *a: 1 / 0)
    code, _, err = run(tmp_path, "verify", capsys=capsys)
    assert code == 2
    assert "ZeroDivisionError" in err
    assert "this is a bug in sami-cache" in err


def test_the_installed_command_runs():
    script = Path(sys.executable).parent / "sami-cache"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().count(".") == 2
