"""Device, dtype and compiler of a run on machines that are only pretended."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

import devices
from config import ConfigError, TrainConfig
from distributed import World


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes on this node but 2 GPUs"):
        devices.choose_device("auto", World(rank=0, size=4, local_size=4))


@pytest.mark.parametrize("cuda, mps, expected", [(False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_mps_before_the_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.choose_device("auto", World())[0].type == expected


@pytest.mark.parametrize("capability, expected", [((7, 0), torch.float16), ((7, 5), torch.float16),
                                                  ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.choose_dtype("auto", torch.device("cuda", 0))[0] == expected


@pytest.fixture
def hopper(monkeypatch) -> pytest.MonkeyPatch:
    """A CUDA device to choose; what a choice sets for the process is taken back."""
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "NVIDIA H100"),
                        ("get_device_capability", (9, 0)), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    before = torch.get_float32_matmul_precision()
    with warnings.catch_warnings():
        yield monkeypatch
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("knobs, words, precision", [
    ({"dtype": "float32"}, "float32 without TF32 (asked for)", "highest"),
    ({"dtype": "float32", "tf32": True}, "float32 with TF32 (asked for)", "high"),
    ({}, "bfloat16 (native on this device)", "highest")])
def test_on_cuda_the_log_says_whether_float32_is_tf32_and_inductor_does_not_ask(hopper, knobs, words, precision):
    from torch._inductor import compile_fx
    machine = devices.choose_machine(TrainConfig(device="cuda", compile="false", **knobs), World())
    assert f"dtype: {words} |" in machine.lines[1]
    assert torch.get_float32_matmul_precision() == precision
    with warnings.catch_warnings(record=True) as caught:
        compile_fx._warn_tf32_disabled.__wrapped__()
    assert not caught


@pytest.mark.parametrize("knobs, capability", [({"dtype": "bfloat16"}, (9, 0)), ({"dtype": "float32"}, (7, 5)),
                                               ({"device": "cpu", "dtype": "float32"}, (9, 0))])
def test_tf32_where_there_is_none_is_refused_and_leaving_it_out_helps(hopper, knobs, capability):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = TrainConfig(**{"device": "cuda", "compile": "false", "tf32": True} | knobs)
    with pytest.raises(ConfigError, match=r"train.tf32 = true, but .* leave it out"):
        devices.choose_machine(config, World())
    devices.choose_machine(replace(config, tf32=False), World())


def test_auto_compiles_only_on_cuda_with_triton_and_a_compiler(monkeypatch):
    assert devices.choose_compile("auto", torch.device("cpu"))[0] is False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(devices.Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/cc")
    assert devices.choose_compile("auto", torch.device("cuda", 0))[0] is True
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    on, reason = devices.choose_compile("auto", torch.device("cuda", 0))
    assert on is False and "compiler" in reason
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert devices.choose_compile("auto", torch.device("cuda", 0)) == (False, "no triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert devices.choose_compile("auto", torch.device("cuda", 0))[0] is False


@pytest.mark.parametrize("found, device, missing", [("g++", "cpu", None), ("gcc", "cpu", "no C++ compiler: no g++"),
                                                    ("gcc", "cuda:0", None), ("g++", "cuda:0", "no C compiler: no ")])
def test_compile_that_is_asked_for_and_cannot_be_is_refused(monkeypatch, found, device, missing):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(devices.Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/" + name if name == found else None)
    assert devices.choose_compile("false", torch.device(device)) == (False, "asked for")
    if missing is None:
        assert devices.choose_compile("true", torch.device(device)) == (True, "asked for")
        return
    with pytest.raises(ConfigError, match=f"train.compile = true, but {re.escape(missing)}.*set it to false"):
        devices.choose_compile("true", torch.device(device))
