"""The tiny model, captions and comparison that the tests of SafeCFG's training share.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

import pytest
import torch

from safelight.defenses.trainer import Plan, Step
from safelight.defenses.training_model import TrainingModel

CLEAN = ("a red circle", "a blue ring above a white heart", "a green plus sign", "a pink flower")
PROMPTS = ("a {concept}", "a red {concept} above a blue circle")
CONCEPTS = ("star", "pentagram")
CONFIG = {"clean": CLEAN, "prompts": PROMPTS, "pictures": 5, "picture_steps": 2, "picture_scale": 3.0}
PLAN = Plan(steps=6, lr=1e-2, batch=5, ema=0.5, checkpoint_every=2)
NEAR = {"rtol": 1e-4, "atol": 2e-5}  # float32 after tens of layers; the batch is another one


@pytest.fixture(scope="module")
def model(tiny_model):
    return TrainingModel.open(tiny_model)


@pytest.fixture(scope="module")
def case(model):
    """x_t, t, and the tiny UNet's answers to nothing, to a star and to a circle."""
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(3, *model.latent_shape, generator=generator)
    t = torch.tensor([10, 500, 990])

    def answer(text):
        with torch.no_grad():
            return model.predict(model.unet, x_t, t, model.encode([text] * 3))

    return x_t, t, answer(""), answer("a star"), answer("a circle")


def step_of(trained, number=0):
    generator = torch.Generator().manual_seed(number)
    return Step(number, generator, trained, None, torch.device("cpu"))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
