"""A model folder is checked by names before a weight is read, and what does not make the model is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.engine.model_folder import INDEX, NETWORKS, ONE_STEP, ModelFolder
from safelight.errors import BundleError

UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": UNET,
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "safety_checker": "safety_checker/model.safetensors",
}
PARTS = (*NETWORKS, "tokenizer", "scheduler", "feature_extractor")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A fresh copy for a test to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read."""

    def read(*args: object, **named: object) -> None:
        raise RuntimeError("a weight was read before the folder was checked")

    monkeypatch.setattr("safelight.engine.model_folder.class_of", read)


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def refused(model: Path, *words: str, load: str | None = None) -> None:
    """The folder, or a network of it, is refused in one line that holds all `words` and a remedy."""
    with pytest.raises(BundleError) as caught:
        folder = ModelFolder.open(model)
        if load:
            folder.load(load)
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for word in (*words, ";"):
        assert word in message


def test_every_network_is_loaded_in_float32_for_inference(tiny_model):
    folder = ModelFolder.open(tiny_model)
    assert folder.has_one_step
    for name in (*NETWORKS, ONE_STEP):
        network = folder.load(name)
        assert not network.training
        assert not any(value.requires_grad for value in network.parameters())
        assert {value.dtype for value in network.parameters()} == {torch.float32}
        stored = sum(value.numel() for file in folder.weights(name) for value in load_file(file).values())
        assert sum(value.numel() for value in network.parameters()) == stored
    assert folder.one_step().timestep == 999.0
    assert folder.config("scheduler")["_class_name"] == "DDIMScheduler"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_beside_the_weights_is_refused(model: Path, name: str) -> None:
    """transformers would put it into the network unasked, and its weights are in no digest."""
    (model / name / "adapter_config.json").write_text("{}")
    refused(model, f"{name}/adapter_config.json", "--lora")


def test_digests_name_every_weights_file(tiny_model):
    folder = ModelFolder.open(tiny_model)
    assert set(folder.digests()) == {*WEIGHTS.values(), f"{ONE_STEP}/{Path(UNET).name}"}


def test_a_digest_changes_with_a_byte(model):
    before = ModelFolder.open(model).digests()
    content = bytearray((model / UNET).read_bytes())
    content[-1] ^= 1
    (model / UNET).write_bytes(content)
    after = ModelFolder.open(model).digests()
    assert {name for name in before if before[name] != after[name]} == {UNET}


@pytest.mark.usefixtures("unread")
class TestBeforeAnyWeightIsRead:
    @pytest.mark.parametrize("name", PARTS)
    def test_a_missing_part(self, model, name):
        shutil.rmtree(model / name)
        refused(model, f"{model / name} is missing", "restore the folder")

    def test_a_missing_index(self, model, tmp_path):
        (model / INDEX).unlink()
        refused(model, str(model / INDEX))
        refused(tmp_path / "none", "is not a folder")

    @pytest.mark.parametrize("name", [*NETWORKS, ONE_STEP])
    def test_a_missing_configuration(self, model, name):
        (model / name / "config.json").unlink()
        refused(model, str(model / name / "config.json"))

    @pytest.mark.parametrize("name", ["safety_checker", "feature_extractor"])
    @pytest.mark.parametrize("entry", [[None, None], None])
    def test_no_safety_checker(self, model, name, entry):
        edit(model / INDEX, **{name: entry})
        refused(model, str(model / INDEX), f"names no {name}", "nothing runs without a safety checker")

    @pytest.mark.parametrize("name", [*NETWORKS, ONE_STEP])
    @pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pkl"])
    def test_weights_as_a_pickle_only(self, model, name, suffix):
        (file,) = (model / name).glob("*.safetensors")
        file.rename(file.with_suffix(suffix))
        refused(model, str(file.with_suffix(suffix)), "pickle", "safe_serialization=True")

    @pytest.mark.parametrize("name", [*NETWORKS, ONE_STEP])
    def test_no_weights(self, model, name):
        for file in (model / name).glob("*.safetensors"):
            file.unlink()
        refused(model, f"{model / name} holds no .safetensors file")

    @pytest.mark.parametrize(
        "entry",
        [["evil_module", "Evil"], ["diffusers", "Evil"], ["diffusers", "AutoencoderKL"], ["diffusers"]],
    )
    def test_a_class_off_the_list(self, model, entry):
        edit(model / INDEX, unet=entry)
        refused(model, str(model / INDEX), "unet names the class", "UNet2DConditionModel")

    @pytest.mark.parametrize(
        "file, key",
        [
            ("unet/config.json", "_class_name"),
            (f"{ONE_STEP}/config.json", "_class_name"),
            ("text_encoder/config.json", "architectures"),
            ("tokenizer/tokenizer_config.json", "tokenizer_class"),
            ("feature_extractor/preprocessor_config.json", "image_processor_type"),
            ("scheduler/scheduler_config.json", "_class_name"),
        ],
    )
    def test_a_configuration_with_a_class_off_the_list(self, model, file, key):
        edit(model / file, **{key: "Evil"})
        refused(model, str(model / file), f"{key} names the class 'Evil'")

    @pytest.mark.parametrize("key", ["custom_pipeline", "auto_map", "trust_remote_code"])
    @pytest.mark.parametrize("file", [INDEX, "vae/config.json", "tokenizer/tokenizer_config.json"])
    def test_code_to_import(self, model, key, file):
        edit(model / file, nested={"deep": [{key: "evil.py"}]})
        refused(model, str(model / file), repr(key), "remove the key")

    def test_half_of_the_sdxl_class(self, model):
        edit(model / INDEX, _class_name="StableDiffusionXLPipeline")
        refused(model, str(model / INDEX), "StableDiffusionXLPipeline lacks a text_encoder_2", "a refiner is")

    def test_two_text_encoders_of_another_class(self, model):
        edit(model / INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
        refused(model, str(model / INDEX), "StableDiffusionPipeline has a text_encoder_2")

    def test_an_index_that_lists_what_lies_elsewhere(self, model):
        (file,) = (model / "unet").glob("*.safetensors")
        file.rename(model / file.name)
        index = model / "unet" / f"{file.name}.index.json"
        for table in ({"a": f"../{file.name}"}, {"a": file.name}, {"a": 1}, None):
            index.write_text(json.dumps({"weight_map": table}))
            refused(model, str(index), "save the model again")

    def test_two_sets_of_weights(self, model):
        (file,) = (model / "unet").glob("*.safetensors")
        (model / "unet" / f"{file.name}.index.json").write_text(json.dumps({"weight_map": {"a": file.name}}))
        refused(model, str(model / "unet"), "two sets of weights; delete one of them")

    def test_weights_of_another_name_are_not_looked_at(self, model):
        (file,) = (model / "unet").glob("*.safetensors")
        file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))
        refused(model, f"{model / 'unet'} holds no .safetensors file")


def test_a_model_without_a_student_has_one_unet(model):
    shutil.rmtree(model / ONE_STEP)
    folder = ModelFolder.open(model)
    assert not folder.has_one_step and set(folder.digests()) == set(WEIGHTS.values())


def test_a_pickle_beside_the_weights_is_never_read(model):
    for name in NETWORKS:
        (model / name / "pytorch_model.bin").write_bytes(b"not a pickle")
        (model / name / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    folder = ModelFolder.open(model)
    for name in NETWORKS:
        folder.load(name)
    assert not any(name.endswith(".bin") for name in folder.digests())


def as_variant(file: Path) -> Path:
    return file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_the_plain_weights_come_before_the_fp16_variant(model, name):
    file = model / WEIGHTS[name]
    values = {key: torch.zeros_like(value) for key, value in load_file(file).items()}
    save_file(values, as_variant(file), metadata={"format": "pt"})
    folder = ModelFolder.open(model)
    assert folder.weights(name) == [file]
    assert any(value.any() for value in folder.load(name).parameters())


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_the_fp16_variant_is_taken_where_there_is_no_other(model, tiny_model, name):
    file = model / WEIGHTS[name]
    file.rename(as_variant(file))
    folder = ModelFolder.open(model)
    assert folder.weights(name) == [as_variant(file)]
    equal_networks(folder, ModelFolder.open(tiny_model), name)


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_are_one_network(model, tiny_model, name, variant):
    network = ModelFolder.open(model).load(name)
    shutil.rmtree(model / name)
    network.save_pretrained(model / name, max_shard_size="400KB", variant=variant)
    folder = ModelFolder.open(model)
    assert len(folder.weights(name)) > 1
    equal_networks(folder, ModelFolder.open(tiny_model), name)
    folder.weights(name)[0].unlink()
    refused(model, str(model / name), "save the model again", load=name)


def equal_networks(one: ModelFolder, other: ModelFolder, name: str) -> None:
    left, right = one.load(name).state_dict(), other.load(name).state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keep", [-1, 1000, 4, 0])
def test_truncated_weights(model, name, keep):
    file = model / WEIGHTS[name]
    file.write_bytes(file.read_bytes()[:keep])
    refused(model, str(file), "save the model again", load=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_something_else(model, name):
    (model / WEIGHTS[name]).write_bytes(b"\xff" * 100)
    refused(model, str(model / WEIGHTS[name]), "save the model again", load=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tensor_that_is_missing_is_never_made_up(model, name):
    """Libraries fill a gap with random numbers; a safety checker with random concepts blocks nothing."""
    values = load_file(model / WEIGHTS[name])
    gap = "concept_embeds" if name == "safety_checker" else min(values)
    del values[gap]
    save_file(values, model / WEIGHTS[name], metadata={"format": "pt"})
    refused(model, str(model / name), gap, load=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tensor_of_another_shape(model, name):
    values = load_file(model / WEIGHTS[name])
    key = min(key for key, value in values.items() if value.dim() == 2)
    save_file(values | {key: torch.zeros(3, 3)}, model / WEIGHTS[name], metadata={"format": "pt"})
    refused(model, str(model / name), load=name)


@pytest.mark.parametrize(
    "name, change",
    [
        ("text_encoder", {"hidden_size": "x"}),
        ("text_encoder", {"hidden_size": -1}),
        ("text_encoder", {"hidden_act": "os.system"}),
        ("unet", {"block_out_channels": "x"}),
        ("unet", {"down_block_types": ["Evil", "Evil"]}),
        ("vae", {"block_out_channels": [3, 5, 7, 9]}),
    ],
)
def test_a_configuration_that_makes_no_network(model, name, change):
    edit(model / name / "config.json", **change)
    refused(model, str(model / name), load=name)


@pytest.mark.parametrize(
    "change", [{"prediction_type": "x"}, {"num_train_timesteps": "x"}, {"num_train_timesteps": 0}]
)
def test_a_scheduler_that_the_arithmetic_does_not_know(model, change):
    file = model / "scheduler/scheduler_config.json"
    edit(file, **change)
    with pytest.raises(BundleError, match=str(file)):
        ModelFolder.open(model).one_step()
