"""Of a model's folder only safetensors and JSON are read: no code of it runs."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from common import InputError
from data.prompts import prompt_text
from data.tofu import load_task
from model import load_model


class Touch:
    """What runs when it is unpickled: a file appears."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def crafted(small_model, tmp_path) -> Path:
    return shutil.copytree(small_model, tmp_path / "crafted")


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ("pytorch_model.bin", "model.pt"))
def test_a_pickle_is_never_opened(crafted, tmp_path, name):
    ran = tmp_path / "ran"
    (crafted / name).write_bytes(pickle.dumps(Touch(ran)))
    load_model(str(crafted))  # beside safetensors it is ignored
    weights = (crafted / "model.safetensors").read_bytes()
    (crafted / "model.safetensors").unlink()
    assert "cannot load it as safetensors" in refusal(load_model, str(crafted))
    for content in (pickle.dumps(Touch(ran)), weights[:1000], weights[:-1000], b""):  # pickled, or torn
        (crafted / "model.safetensors").write_bytes(content)
        assert "cannot load it as safetensors" in refusal(load_model, str(crafted))
    assert not ran.exists()
    pickle.loads((crafted / name).read_bytes())  # the trap works
    assert ran.exists()


def test_code_in_a_model_folder_does_not_run(crafted, tmp_path):
    """`auto_map` names Python files of the folder. They are ignored, or the folder is refused."""
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Trap: pass\n"
    (crafted / "trap.py").write_text(code)

    def edit(name, **changes):
        file = crafted / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    edit("config.json", auto_map={"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"})
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Trap", "trap.Trap"]})
    try:
        load_model(str(crafted))
    except InputError as error:
        assert "trust_remote_code" in str(error)
    edit("config.json", model_type="trap")
    assert "cannot load it" in refusal(load_model, str(crafted))
    assert not ran.exists()
    exec(compile(code, "trap", "exec"), {})  # the trap works
    assert ran.exists()


@pytest.mark.parametrize("template", (
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}", "{% for i in range(10**12) %}x{% endfor %}",
    "{% nonsense"))
def test_a_chat_template_stays_in_its_sandbox(crafted, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_model(str(crafted)).tokenizer
    tokenizer.chat_template = template
    assert "chat template fails" in refusal(prompt_text, tokenizer, "chat", "Who?")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ("../nowhere", "../../etc", "a/../b", "http://x/y", "file:///etc"))
def test_a_name_that_is_no_folder_and_no_hub_id_is_not_looked_up(name):
    assert "not found" in refusal(load_task, name, "forget10")
    assert "cannot load it" in refusal(load_model, name)
