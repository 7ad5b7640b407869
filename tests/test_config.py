"""config.py: reading, checking, writing and explaining the knobs; UserError and exit statuses."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MachineError,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    TrainConfig,
)

ROOT = Path(__file__).resolve().parents[1]


def parse(*words: str) -> Config:
    return config.parse_arguments(list(words))[0]


def write(folder: Path, text: str, name: str = "run.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- Errors: the thing, the value, the way out; exit status 2 --------------------------------------------------------

# words on the command line, then what the one line on stderr must hold
MISTAKES = {
    "unknown section": (["modl.n_layer=2"], "[modl]", "did you mean 'model'"),
    "unknown section far from all": (["zzz.n_layer=2"], "[zzz]", "there are: model, data, optim, train"),
    "unknown knob": (["model.n_layers=2"], "model.n_layers", "did you mean 'n_layer'"),
    "unknown knob far from all": (["optim.zzz=2"], "optim.zzz", "there are: name, lr"),
    "override without a section": (["lr=3e-4"], "'lr=3e-4'", "write optim.lr=3e-4"),
    "override of nothing known": (["zzz=3"], "'zzz=3'", "write section.key=value"),
    "neither file nor override": (["gpt2_124m"], "'gpt2_124m'", "--help lists every knob"),
    "option that does not exist": (["--resume"], "'--resume'", "--help lists every knob"),
    "whole number from a word": (["model.n_layer=two"], "model.n_layer = 'two'", "should be a whole number"),
    "whole number from a fraction": (["model.n_layer=1.5"], "model.n_layer = 1.5", "should be a whole number"),
    "whole number from infinity": (["train.max_steps=inf"], "train.max_steps = inf", "should be a whole number"),
    "whole number from a boolean": (["model.n_layer=true"], "model.n_layer = True", "should be a whole number"),
    "number from a word": (["optim.lr=fast"], "optim.lr = 'fast'", "should be a number"),
    "number from a boolean": (["optim.lr=true"], "optim.lr = True", "should be a number"),
    "not a number": (["optim.lr=nan"], "optim.lr = nan", "should be a number"),
    "boolean from a number": (["model.bias=1"], "model.bias = 1", "should be true or false"),
    "boolean from a word": (["model.bias=yes"], "model.bias = 'yes'", "should be true or false"),
    "nothing for what cannot be left out": (["train.max_steps=None"], "train.max_steps = None",
                                            "should be a whole number"),
    "a switch in Python's spelling": (["train.compile=True"], "train.compile = 'True'", "one of auto, true, false"),
    "string from a list": (['data.dir=["a"]'], "data.dir = ['a']", "should be a string"),
    "list of the wrong length": (["optim.betas=[0.9]"], "optim.betas = [0.9]", "should be a list of 2 numbers"),
    "list of the wrong type": (['train.profile_steps=["a"]'], "train.profile_steps = 'a'", "should be a whole number"),
    "not a choice": (["model.norm=batchnorm"], "model.norm = 'batchnorm'", "one of layernorm, rmsnorm"),
    "too small": (["model.n_layer=0"], "model.n_layer = 0", "should be at least 1"),
    "too large": (["model.dropout=1.5"], "model.dropout = 1.5", "should be at most 0.99"),
    "not above its limit": (["optim.lr=0"], "optim.lr = 0", "should be above 0.0"),
    "seed beyond 64 bits": (["train.seed=18446744073709551616"], "train.seed = 18446744073709551616",
                            "should be at most"),
    "width and heads": (["model.n_embd=100", "model.n_head=3"], "model.n_embd = 100", "model.n_head = 3",
                        "change one or set model.head_dim"),
    "heads and key heads": (["model.n_head=12", "model.n_kv_head=5"], "model.n_head = 12", "model.n_kv_head = 5",
                            "change one"),
    "odd head with RoPE": (["model.position=rope", "model.head_dim=3"], "even head_dim, not 3", "change"),
    "RoPE scaling without RoPE": (["model.rope_scaling={factor = 2.0}"], "model.rope_scaling", "'learned'",
                                  "set model.position = 'rope'"),
    "llama3 factors": (["model.position=rope", 'model.rope_scaling={kind = "llama3", high_freq_factor = 0.5}'],
                       "model.rope_scaling.high_freq_factor = 0.5", "above low_freq_factor = 1.0"),
    "unknown knob of a table": (["model.rope_scaling={fctor = 2.0}"], "model.rope_scaling.fctor",
                                "did you mean 'factor'"),
    "range in a table": (["model.rope_scaling={factor = 0.5}"], "model.rope_scaling.factor = 0.5", "at least 1.0"),
    "table from a number": (["model.rope_scaling=2"], "model.rope_scaling = 2", "should be a table"),
    "lowest rate above the peak": (["optim.lr=1e-3", "optim.min_lr=2e-3"], "optim.min_lr = 0.002", "optim.lr = 0.001"),
    "beta of 1": (["optim.betas=[0.9, 1.0]"], "optim.betas = [0.9, 1.0]", "should lie in [0, 1)"),
    "warmup longer than the decay": (["optim.warmup_steps=50", "optim.decay_steps=50"], "optim.warmup_steps = 50",
                                     "ends at 50", "lower it or raise train.max_steps"),
    "warmup reaches wsd's decay": (["optim.schedule=wsd", "optim.warmup_steps=81", "optim.decay_steps=100"],
                                   "optim.warmup_steps = 81", "step 80", "lower it or optim.decay_fraction"),
    "two beginnings": (["train.init_from=a", "train.fork_from=b"], "train.init_from", "train.fork_from", "keep one"),
    "profile beyond the end": (["train.profile_steps=[3, 9]", "train.max_steps=5"], "train.profile_steps", "step 9",
                               "from 1 to 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_thing_value_and_way_out_and_exit_2(mistake, monkeypatch, capsys):
    words, *wanted = MISTAKES[mistake]
    assert_user_error(words, wanted, monkeypatch, capsys)


# text of run.toml, then what the line must hold
FILE_MISTAKES = {
    "no TOML": ("[model\n", "run.toml", "not valid TOML", "line 1"),
    "a boolean in Python's spelling": ("[model]\nbias = True\n", "run.toml", "line 2", "switches are true or false"),
    "a key twice": ("[model]\nn_layer = 1\nn_layer = 2\n", "run.toml", "not valid TOML", "line 3"),
    "a key outside a section": ("n_layer = 1\n", "run.toml", "'n_layer'", "put it under [model]"),
    "unknown section": ("[optimizer]\nlr = 1\n", "[optimizer]", "did you mean 'optim'"),
    "unknown knob": ("[train]\nmicrobatch = 8\n", "train.microbatch", "did you mean 'micro_batch'"),
    "wrong type": ('[model]\nn_layer = "2"\n', "model.n_layer = '2'", "should be a whole number"),
}


@pytest.mark.parametrize("mistake", FILE_MISTAKES)
def test_a_mistake_in_a_file_is_one_line_and_exit_2(mistake, tmp_path, monkeypatch, capsys):
    text, *wanted = FILE_MISTAKES[mistake]
    assert_user_error([write(tmp_path, text)], wanted, monkeypatch, capsys)


def test_a_missing_file_names_its_near_neighbour_or_where_examples_are(tmp_path, monkeypatch, capsys):
    write(tmp_path, "", "shakespeare.toml")
    assert_user_error([str(tmp_path / "shakespear.toml")], ["shakespear.toml", "did you mean 'shakespeare.toml'"],
                      monkeypatch, capsys)
    assert_user_error([str(tmp_path / "zzz.toml")], ["zzz.toml", "configs/ holds examples"], monkeypatch, capsys)


def test_a_file_that_cannot_be_read_is_an_error_of_the_user(tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.toml").mkdir()
    assert_user_error([str(tmp_path / "folder.toml")], ["folder.toml", "cannot be read"], monkeypatch, capsys)
    (tmp_path / "latin.toml").write_bytes(b'[train]\nout_dir = "caf\xe9"\n')
    assert_user_error([str(tmp_path / "latin.toml")], ["latin.toml", "not valid TOML"], monkeypatch, capsys)


def assert_user_error(words: list[str], wanted: list[str], monkeypatch, capsys) -> None:
    """python config.py WORDS ends with one line on stderr that holds all of wanted, nothing on stdout, status 2."""
    monkeypatch.setattr(sys, "argv", ["config.py", *words])
    with pytest.raises(SystemExit) as exit_info:
        config.exit_cleanly(config.main)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert [text for text in wanted if text not in err] == [], err


def test_a_process_that_meets_a_mistake_exits_2_without_a_traceback():
    done = subprocess.run([sys.executable, "config.py", "model.n_layers=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: model.n_layers is not a knob; did you mean 'n_layer'?\n"


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_streams_that_the_starter_closed_take_what_is_printed_and_no_file_gets_their_number(tmp_path, closed):
    code = ("import config, faulthandler, sys, pathlib\n"
            "def main(argv):\n"
            "    faulthandler.enable()\n"
            "    with open('result', 'w') as file:\n"
            "        print('\\u4e16')\n"
            "        print('note', file=sys.stderr)\n"
            "        file.write(f'{file.fileno() > 2} {sys.stdin.read()}')\n"
            "config.exit_cleanly(main)\n")
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], cwd=tmp_path, input="",
                          text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == "True "
    assert done.stderr == ("" if "2>" in closed else "note\n")


@pytest.mark.parametrize("error, status", [(ConfigError("x"), 2), (MachineError("x"), 1), (KeyboardInterrupt(), 130)])
def test_each_kind_of_failure_has_its_exit_status(error, status):
    def main(argv: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        config.exit_cleanly(main)
    assert exit_info.value.code == status


def test_a_bug_of_ours_keeps_its_traceback():
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        config.exit_cleanly(main)


def test_ranks_other_than_0_exit_with_the_status_in_silence(monkeypatch, capsys):
    def main(argv: list[str]) -> None:
        raise ConfigError("x")

    for rank, wanted in (("0", "error: x\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_info:
            config.exit_cleanly(main)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("word", ["optim.lr=inf", "optim.weight_decay=inf", "optim.muon_lr=1e999",
                                  "model.logit_softcap=inf", "model.norm_eps=inf", "model.rope_theta=inf"])
def test_infinity_is_refused_where_it_does_not_mean_off(word):
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        parse(word)


# ---- Reading ---------------------------------------------------------------------------------------------------------

def test_files_and_overrides_apply_left_to_right(tmp_path):
    first = write(tmp_path, "[model]\nn_layer = 1\nn_head = 4\n[train]\nmax_steps = 10\n", "first.toml")
    second = write(tmp_path, "[model]\nn_layer = 2\n", "second.toml")
    assert parse(first, second).model.n_layer == 2
    assert parse(second, first).model.n_layer == 1
    assert parse(first, "model.n_layer=7", second).model.n_layer == 2
    mixed = parse(first, second, "model.n_layer=7", "model.n_layer=8")
    assert (mixed.model.n_layer, mixed.model.n_head, mixed.train.max_steps) == (8, 4, 10)


def test_parsing_tells_which_knobs_were_given(tmp_path):
    path = write(tmp_path, "[model]\nn_layer = 12\n")
    assert config.parse_arguments([path, "optim.lr=1e-3"])[1] == {"model.n_layer", "optim.lr"}


def test_the_default_file_is_read_only_when_no_file_is_named(tmp_path):
    default = Path(write(tmp_path, "[model]\nn_layer = 3\n", "demo.toml"))
    other = write(tmp_path, "[model]\nn_head = 6\n", "other.toml")
    read = lambda *words: config.parse_arguments(list(words), default_file=default)[0].model  # noqa: E731
    assert read().n_layer == 3
    assert (read("model.n_head=4").n_layer, read("model.n_head=4").n_head) == (3, 4)
    assert read("model.n_layer=5").n_layer == 5  # the override comes after the default file
    assert (read(other).n_layer, read(other).n_head) == (12, 6)


@pytest.mark.parametrize("word, value", [
    ("train.max_steps=1e6", 1_000_000),
    ("train.max_steps=524_288", 524_288),
    ("optim.lr=1", 1.0),
    ("optim.grad_clip=inf", math.inf),
    ("data.source=my book.txt", ("my book.txt",)),
    ('data.source=["a.txt", "b.txt"]', ("a.txt", "b.txt")),
    ("data.tokenizer=bpe:4096", "bpe:4096"),
    ('train.out_dir="out/a=b"', "out/a=b"),
    ("train.out_dir=out/a=b", "out/a=b"),
    ("train.out_dir=2024", "2024"),
    ("train.out_dir=2024-01-01", "2024-01-01"),
    ("data.source=2024", ("2024",)),
    ("data.source=007", ("007",)),
    ("data.source=2024-05-01", ("2024-05-01",)),
    ("data.val_source=1e3", ("1e3",)),
    ("data.source=true", ("true",)),
    ("data.source=True", ("True",)),
    ("data.tokenizer=1.0", "1.0"),
    ("train.out_dir=True", "True"),
    ("model.bias=False", False),
    ("model.qkv_bias=True", True),
    ("model.window=None", None),
    ("train.init_from=None", None),
    ("data.dir=~/shards", "/home/me/shards"),
    ('data.source=["~/a.txt", "b~.txt", "~"]', ("/home/me/a.txt", "b~.txt", "~")),
    ("train.out_dir=./~/out", "./~/out"),
    ("train.compile=false", "false"),
    ("model.bias=false", False),
    ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
    ("train.profile_steps=7", (7,)),
    ("model.n_kv_head=4", 4),
    ("--optim.lr=0.25", 0.25),
])
def test_an_override_becomes_the_type_of_its_knob(word, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, key = word.lstrip("-").split("=")[0].split(".")
    got = getattr(getattr(parse(word), section), key)
    assert got == value and type(got) is type(value)


def test_a_table_may_be_given_in_part_and_keeps_the_other_defaults(tmp_path):
    path = write(tmp_path, '[model]\nposition = "rope"\n[model.rope_scaling]\nkind = "llama3"\nfactor = 8\n')
    assert parse(path).model.rope_scaling == RopeScaling(kind="llama3", factor=8.0)


def test_sizes_left_out_follow_from_the_others():
    model = ModelConfig(n_embd=96, n_head=6)
    assert (model.kv_heads, model.dim_per_head, model.mlp_width, model.has_qkv_bias) == (6, 16, 384, True)
    model = ModelConfig(n_embd=96, n_head=6, n_kv_head=2, head_dim=20, mlp="swiglu", bias=False, qkv_bias=True)
    assert (model.kv_heads, model.dim_per_head, model.has_qkv_bias) == (2, 20, True)
    assert model.mlp_width == 256  # 8/3 x 96 = 256, a multiple of 64 already
    assert ModelConfig(n_embd=97, mlp="swiglu").mlp_width == 320  # 258.67 rounded up


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.n_layer = 3


# ---- Writing ---------------------------------------------------------------------------------------------------------

NASTY = 'C:\\new\\"quoted" \'single\' λ→語 \n\r\t\b\f\x01\x1f\x7f\x85\u2028 = # end'

EVERY_KNOB_CHANGED = Config(
    model=ModelConfig(
        n_layer=3, n_head=6, n_kv_head=2, n_embd=66, head_dim=10, mlp_hidden=77, vocab_size=1037, max_seq_len=63,
        norm="rmsnorm", norm_eps=1e-06, position="rope", rope_theta=5e5,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.5, high_freq_factor=3.5,
                                 original_max_seq_len=4096),
        mlp="relu2", qk_norm=True, bias=False, qkv_bias=False, mlp_bias=False, tie_embeddings=False, dropout=0.125,
        logit_softcap=30.0, window=17, init="zero_residual"),
    data=DataConfig(
        source=("a b.txt", NASTY), val_source=("val.jsonl",), dir="shards/ü", tokenizer="bpe:4096", val_fraction=0.1,
        text_field=NASTY, kind="text", chat_template="chat.jinja", too_long="drop", bad_rows="skip",
        parse_special=True, document_mask=True),
    optim=OptimConfig(
        name="muon", lr=1e-22, min_lr=1e-23, schedule="wsd", warmup_steps=3, decay_steps=1234, decay_fraction=0.3,
        betas=(0.0, 0.999), eps=1e-16, weight_decay=0.0, grad_clip=math.inf, muon_lr=1 / 3, muon_momentum=0.9),
    train=TrainConfig(
        out_dir=NASTY, max_steps=4567, tokens_per_step=126, micro_batch=3, seed=7, device="cpu", dtype="bfloat16",
        tf32=True, skip_spikes=6.5, shard=2, compile="false", kernels="torch", activation_checkpointing=True,
        init_from="out/base", fork_from=None, async_save=True,
        eval_every=11, eval_tokens=630, log_every=2, save_every=13, keep=5, sample_every=17, tracker="wandb",
        deterministic=True, timeout_s=1.5, profile_steps=(2, 3)),
    lora=LoraConfig(alpha=1 / 3, dropout=0.5, targets=("mlp.fc", "attn.proj")))


def test_written_config_loads_back_equal(tmp_path):
    for name, original in (("default", Config()), ("changed", EVERY_KNOB_CHANGED)):
        path = write(tmp_path, config.to_toml(original), f"{name}.toml")
        assert parse(path) == original


def test_the_round_trip_above_covers_every_knob():
    pairs = [(getattr(Config(), s.name), getattr(EVERY_KNOB_CHANGED, s.name)) for s in dataclasses.fields(Config)]
    pairs.append((RopeScaling(), EVERY_KNOB_CHANGED.model.rope_scaling))
    same = [f.name for default, changed in pairs for f in dataclasses.fields(default)
            if getattr(default, f.name) == getattr(changed, f.name)]
    assert same == ["fork_from", "rank"]  # exclude init_from and muon


def test_differences_name_knob_old_and_new_value():
    ours, theirs = ModelConfig(n_layer=2, dropout=0.5, window=9), ModelConfig()
    assert config.differences(ours, theirs, "model") == [
        "model.n_layer: 12 -> 2", "model.dropout: 0.0 -> 0.5", "model.window: None -> 9"]
    assert config.differences(theirs, theirs, "model") == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_file_in_configs_loads(path):
    parse(str(path))


# ---- --help ----------------------------------------------------------------------------------------------------------

def test_help_lists_every_knob_with_default_and_meaning_and_does_not_import_torch():
    program = ("import runpy, sys; sys.argv = ['config.py', '--help']; "
               "runpy.run_path('config.py', run_name='__main__'); "
               "print(sorted({'torch', 'numpy'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    for section in dataclasses.fields(Config):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"[{section.name}]"))
        end = lines.index("", start)
        for knob in dataclasses.fields(getattr(Config(), section.name)):
            line = next(i for i in range(start, end) if lines[i].startswith(f"  {knob.name} = "))
            assert lines[line + 1].strip() == knob.metadata["what"] != ""


def test_help_lists_the_knobs_of_rope_scaling():
    text = config.help_text()
    assert [f.name for f in dataclasses.fields(RopeScaling) if f.metadata["what"] not in text] == []


def test_help_into_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "config.py", "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
