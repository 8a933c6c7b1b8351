"""Where people really run the scripts: kinds of trouble, one letter each, as RESULTS.md lists them.

A other programs' files, B cosmetics, C files that are there but unusable, D data that are not MNIST, F no network,
G processes that cannot start, H closed outputs, I foreseeable mistakes, J downloads, K isolated Python, M warnings.
E (limits of the machine), L (photos) and N (diagnosis) are tests of test_limits.py, test_photos.py and test_health.py.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import engine_script
import numpy as np
import pytest
from conftest import (
    MNIST_DIR,
    ROOT,
    downloads_from,
    load,
    make_run,
    needs_mnist,
    needs_proc,
    run_script,
    start_script,
    write_mnist,
)

import common
import q1_baseline

SCRIPT = "tests/engine_script.py"
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def small(mnist_folder, more="--workers 1"):
    """Arguments of a training of a second."""
    return f"--data-dir {mnist_folder} --out-dir out --epochs 1 --only a {more}"


def results_exist(folder):
    return (folder / "out" / "engine_script.json").exists() and (folder / "out" / "engine_script_curves.png").exists()


# ---- A: other programs' files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [".file.csv.swp", ".file.csv.1234", ".file.csv.9999999", "file.csv~", "#file.csv#"])
def test_A_files_of_other_programs_stay(name, tmp_path):
    (tmp_path / name).write_text("unsaved work")
    os.utime(tmp_path / name, (0, 0))
    common.write_file(tmp_path / "file.csv", b"new")
    assert (tmp_path / name).read_text() == "unsaved work"


def test_A_half_written_files_of_ours_go_when_they_are_old(tmp_path):
    old, young = (tmp_path / f".other.{age}{common.PARTIAL}" for age in ("old", "young"))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    common.write_file(tmp_path / "file.csv", b"new")
    assert not old.exists() and young.exists()


def test_A_writers_with_the_same_process_number_have_files_of_their_own(tmp_path, monkeypatch):
    """As in two containers with one folder."""
    names = []
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: names.append(path.name) or path.touch())
    for _ in range(2):
        common.write_file(tmp_path / "file", b"")
    assert len(set(names)) == 2


# ---- B: cosmetics decide nothing -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"MPLBACKEND": "module://not_installed.backend"},
        {"MPLBACKEND": "NoSuchBackend"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "iso-8859-2"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_B_results_do_not_depend_on_the_environment(environment, mnist_folder, tmp_path):
    arguments = small(mnist_folder, "--workers 1 --seeds 2")  # whose table has ±
    code, out, err = run_script(SCRIPT, arguments, tmp_path, env={**os.environ, **environment})
    assert code == 0 and not err and results_exist(tmp_path), err


def test_B_a_matplotlibrc_decides_nothing(tmp_path):
    """One that asks for LaTeX, which may not be here."""
    import matplotlib

    run = make_run(history=common.History([{f"{p}_{q}": 1.0 for p in ("train", "val") for q in ("loss", "accuracy")}]))
    run.history.best_epoch = 1
    with matplotlib.rc_context({"text.usetex": True, "savefig.format": "pdf", "figure.facecolor": "red"}):
        common.save_plot(tmp_path / "a.png", "50 % ± 1 %", "MNIST", common.plot_curves, {"a": [run]})
        assert matplotlib.rcParams["text.usetex"]  # as it was
    common.save_plot(tmp_path / "b.png", "50 % ± 1 %", "MNIST", common.plot_curves, {"a": [run]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_B_a_plot_that_fails_is_one_line(mnist_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "plot_curves", lambda results: 1 / 0)
    engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 1 --only a --workers 1".split())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "engine_script_curves.png" in err and "ZeroDivisionError" in err
    assert (tmp_path / "engine_script.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_B_a_folder_whose_name_cannot_be_printed(mnist_folder, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    arguments = ["--data-dir", mnist_folder, "--out-dir", folder, "--epochs", "1", "--only", "a", "--workers", "1"]
    stdout, sys.stdout = sys.stdout, open(tmp_path / "log", "w", encoding="ascii")
    try:
        engine_script.main([str(argument) for argument in arguments])
    finally:
        sys.stdout.close()
        sys.stdout = stdout
    assert os.path.exists(f"{folder}/engine_script.json") and r"\udcff" in (tmp_path / "log").read_text()


# ---- C: files that are there but unusable ----------------------------------------------------------------------------
def put_folder(path):
    path.unlink()
    path.mkdir()


def put_dead_link(path):
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


@needs_posix
@pytest.mark.parametrize("damage", [put_folder, put_dead_link])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_C_unusable_file_is_an_error_even_with_auto(damage, name, mnist_folder, tmp_path):
    shutil.copytree(mnist_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "MNIST" / "raw" / name
    damage(path)
    with pytest.raises(SystemExit, match=f"^{re.escape(str(path))} cannot be read: .*$"):
        load(tmp_path, "auto")


def test_C_file_without_read_permission_is_an_error_even_with_auto(mnist_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte cannot be read: Permission denied$"):
        load(mnist_folder, "auto")


def test_C_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(SystemExit, match="data is a file or a broken link, not a folder$"):
        load(tmp_path / "data", "auto")


@needs_posix
@pytest.mark.parametrize("place", ["data", "data/MNIST", "data/MNIST/raw"])
def test_C_a_link_to_a_missing_folder_is_an_error(place, tmp_path):
    """A disk that is not mounted."""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        SystemExit, match=f"{re.escape(str(tmp_path / place))} is a file or a broken link, not a folder$"
    ):
        load(tmp_path / "data", "auto")


def test_C_a_folder_without_permission_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="cannot be read: Permission denied$"):
        load(tmp_path, "auto")


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST", "dots"])
def test_C_near_misses_get_advice(place, mnist_folder, tmp_path):
    shutil.copytree(mnist_folder, tmp_path, dirs_exist_ok=True)
    folder = tmp_path if place == "dots" else tmp_path / place
    if place == "dots":
        for path in (tmp_path / "MNIST" / "raw").iterdir():
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    with pytest.raises(SystemExit, match=r"train-images.idx3-ubyte is there, but it is looked for as .*: move it$"):
        load(folder, "auto")


def test_C_home_is_expanded(mnist_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist_folder))
    monkeypatch.setenv("USERPROFILE", str(mnist_folder))
    args = common.parse_args(engine_script.__file__, "", {}, ["--data-dir", "~", "--out-dir", str(tmp_path)])
    assert args.data_dir == mnist_folder


# ---- D: data that are not MNIST --------------------------------------------------------------------------------------
def change_images(folder, change):
    """Pass all images, uint8 (N, 28, 28), through a function."""
    for path in (folder / "MNIST" / "raw").glob("*images*"):
        content = path.read_bytes()
        images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
        path.write_bytes(content[:16] + np.ascontiguousarray(change(images)).tobytes())


def exchange_splits(folder):
    raw = folder / "MNIST" / "raw"
    for kind in ("images-idx3", "labels-idx1"):
        first, second = raw / f"train-{kind}-ubyte", raw / f"t10k-{kind}-ubyte"
        first.rename(raw / "other")
        second.rename(first)
        (raw / "other").rename(second)


OTHERS = {
    "inverted": lambda folder: change_images(folder, lambda images: 255 - images),
    "transposed": lambda folder: change_images(folder, lambda images: images.transpose(0, 2, 1)),
    "blank": lambda folder: change_images(folder, np.zeros_like),
    "exchanged": exchange_splits,
}


def check_name(folder, other, capsys):
    assert load(folder).name == "MNIST-like data"
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "train-images-idx3-ubyte" in line and "called MNIST-like data" in line
    assert ("EMNIST" in line) == (other == "transposed")


@pytest.mark.parametrize("other", OTHERS)
def test_D_other_data_are_not_called_mnist(other, tmp_path, capsys):
    OTHERS[other](write_mnist(tmp_path))
    check_name(tmp_path, other, capsys)


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_D_changed_mnist_is_not_called_mnist(other, tmp_path, capsys):
    shutil.copytree(MNIST_DIR / "MNIST", tmp_path / "MNIST", copy_function=shutil.copyfile)
    OTHERS[other](tmp_path)
    check_name(tmp_path, other, capsys)


@needs_mnist
def test_D_mnist_is_called_mnist(capsys):
    assert load(MNIST_DIR).name == "MNIST"
    assert not capsys.readouterr().out


def test_D_labels_are_disputed_in_mnist_only(mnist_folder, tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(q1_baseline, "plot_mistakes", lambda mistakes, test, disputed: marked.append(disputed))
    q1_baseline.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 1 --limit 50 --workers 1".split())
    assert marked == [()]
    source = json.loads((tmp_path / "q1_baseline.json").read_text())["data"]["source"]
    assert source == "MNIST-like data"


# ---- F: one machine needs no network ---------------------------------------------------------------------------------
@needs_proc
@pytest.mark.slow
def test_F_no_process_has_a_network_socket(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --seeds 2 --workers 2 --epochs 3"
    environment = {**os.environ, "TROUBLE": "d wait"}
    with start_script(SCRIPT, arguments, tmp_path, env=environment) as process:
        for line in process.stdout:
            if "d, seed 0: epoch" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        links = [os.readlink(fd) for pid in (process.pid, *children) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert len(children) >= 2 and len(links) > 10
    network = "".join(path.read_text() for path in Path("/proc/net").glob("[tu][cd]p*"))  # tcp, tcp6, udp, udp6
    sockets = [link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")]
    assert not set(sockets) & set(network.split())


@needs_proc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_F_two_workers_need_no_loopback(mnist_folder, tmp_path):
    command = ["unshare", "--map-root-user", "--net", sys.executable, ROOT / SCRIPT]
    if subprocess.run([*command[:3], "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    arguments = f"--data-dir {mnist_folder} --out-dir out --seeds 2 --workers 2 --epochs 1".split()
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and results_exist(tmp_path), done.stderr


@pytest.mark.slow
def test_F_a_long_name_of_the_temporary_folder_stops_no_worker(mnist_folder, tmp_path):
    folder = tmp_path / ("long" * 30)  # too long for the address of a Unix socket
    folder.mkdir()
    arguments = small(mnist_folder, "--seeds 2 --workers 2")
    code, _, err = run_script(SCRIPT, arguments, tmp_path, env={**os.environ, "TMPDIR": str(folder)})
    assert code == 0 and results_exist(tmp_path), err


# ---- G: processes that cannot start ----------------------------------------------------------------------------------
@needs_posix
@pytest.mark.slow
def test_G_too_few_file_descriptors_are_one_line(mnist_folder, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (14, 14))

    code, _, err = run_script(SCRIPT, small(mnist_folder, "--workers 2 --seeds 2"), tmp_path, preexec_fn=limit)
    assert code == 1 and err.splitlines()[-1].startswith("worker processes cannot start"), err
    assert "--workers 1" in err and "Traceback" not in err


@pytest.mark.slow
def test_G_under_a_profiler_is_one_line(mnist_folder, tmp_path):
    arguments = small(mnist_folder, "--workers 2 --seeds 2").split()
    command = [sys.executable, "-m", "cProfile", "-o", "profile", ROOT / SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.startswith("worker processes cannot start") and done.stderr.count("\n") == 1, done.stderr
    assert "--workers 1" in done.stderr


def test_G_a_process_that_cannot_start_is_one_line(mnist_folder, tmp_path, monkeypatch, capsys):
    def refuse(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --epochs 1 --seeds 2 --workers 2".split()
    with pytest.raises(SystemExit) as end:
        engine_script.main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 1 and re.match(
        "worker processes cannot start .*unavailable.*; --workers 1 needs none\n", err
    )


# ---- H: closed outputs -----------------------------------------------------------------------------------------------
@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_H_training_goes_on_without_outputs(closed, workers, mnist_folder, tmp_path):
    def close():
        for fd in closed:
            os.close(fd)

    arguments = small(mnist_folder, f"--workers {workers} --seeds 2")
    code, _, _ = run_script(SCRIPT, arguments, tmp_path, preexec_fn=close)
    assert code == 0 and results_exist(tmp_path)


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_H_training_goes_on_when_its_reader_goes_away(workers, mnist_folder, tmp_path):
    process = start_script(SCRIPT, small(mnist_folder, f"--workers {workers} --seeds 2"), tmp_path)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == "" and process.wait(60) == 0
    assert results_exist(tmp_path)


# ---- I: foreseeable mistakes -----------------------------------------------------------------------------------------
def test_I_unusable_folder_of_checkpoints_is_one_line(mnist_folder, tmp_path):
    (tmp_path / "engine_script_runs").write_text("in the way")
    with pytest.raises(SystemExit, match="^cannot write in .*engine_script_runs: .*; give another --out-dir$"):
        engine_script.main(f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1".split())


def test_I_unreadable_checkpoint_is_called_so(mnist_folder, tmp_path, monkeypatch):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --epochs 1 --only a --resume".split()
    engine_script.main(arguments)
    read = Path.read_bytes

    def refuse(path):
        if path.suffix == ".pt":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SystemExit, match="^cannot read .*a_seed0.pt: Permission denied$"):
        engine_script.main(arguments)


@pytest.mark.parametrize("seed", ["18446744073709551616", "-1", "0.5", "one"])
def test_I_seeds_that_torch_cannot_take_are_one_line(seed, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        engine_script.main(["--out-dir", str(tmp_path), f"--seed={seed}"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and seed in err and "18446744073709551615" in err


def test_I_the_largest_seed_trains(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir {tmp_path} --workers 1 --epochs 1 --only a"
    engine_script.main(f"{arguments} --seed 18446744073709551615".split())
    engine_script.main(f"{arguments} --seed 18446744073709551615 --resume".split())


def test_I_interrupt_outside_of_the_training_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(common, "load_data", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        q1_baseline.main(["--out-dir", str(tmp_path)])
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == "interrupted\n"


@needs_posix
@pytest.mark.slow
def test_I_second_interrupt_does_not_disturb_the_first(mnist_folder, tmp_path):
    arguments = f"--data-dir {mnist_folder} --out-dir out --workers 1"
    environment = {**os.environ, "TROUBLE": "a wait"}
    with start_script(SCRIPT, arguments, tmp_path, env=environment) as process:
        for line in process.stdout:
            if "epoch  1/3" in line:
                break
        process.send_signal(signal.SIGINT)
        for _ in range(10):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err and "interrupted" in out
    assert (tmp_path / "out" / "engine_script_curves.png").exists()


# ---- J: downloads ----------------------------------------------------------------------------------------------------
class HangUp(BaseHTTPRequestHandler):
    """Closes the connection without an answer."""

    def do_GET(self):
        self.close_connection = True

    def log_message(self, *_):
        pass


class Rubbish(HangUp):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Please log in</html>")


@pytest.mark.slow
@pytest.mark.parametrize("handler", [HangUp, Rubbish])
def test_J_second_mirror_is_asked(handler, serve, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DOWNLOAD", mirror.replace("mirrors = [", f"mirrors = [{serve(handler)!r}, ", 1))
    assert len(load(tmp_path / "data").train.labels) == 880


@pytest.mark.slow
def test_J_the_reason_of_every_mirror_is_shown(serve, tmp_path, monkeypatch):
    addresses = [serve(HangUp), serve(Rubbish)]
    monkeypatch.setattr(common, "DOWNLOAD", downloads_from(addresses))
    with pytest.raises(SystemExit) as end:
        load(tmp_path / "data")
    line = str(end.value.code)
    assert "\n" not in line and all(address in line for address in addresses)
    assert "Remote end closed connection" in line and "corrupted" in line


# ---- K: isolated Python ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("script", ["q1_baseline.py", "q3_tuning.py", "q2_variants/variant1_kernel_sizes.py"])
@pytest.mark.parametrize("option", ["-I", "-P"])
def test_K_scripts_find_common_in_isolated_python(script, option, tmp_path):
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 brought -P")
    command = [sys.executable, option, ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--epochs" in done.stdout, done.stderr


def test_K_every_script_says_where_common_is():
    for path in [ROOT / "q1_baseline.py", ROOT / "q3_tuning.py", *ROOT.glob("q*/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "import common" not in text or "sys.path.insert(0, " in text.split("import common")[0], path


# ---- M: warnings of libraries ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_M_no_warning_when_limits_of_floats_are_measured(tmp_path):
    """NumPy warns if it measures them while denormal numbers are flushed."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\ncommon.setup(1)\nimport numpy as np\n"
        "print(np.finfo(np.float32).smallest_subnormal > 0, np.finfo(np.float64).smallest_subnormal > 0)\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
