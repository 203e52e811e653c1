"""The tensors of every graph of a bundle, and the graphs themselves: an eager module becomes ONNX, opset 20.

Writes no file and touches no weight. A length that is chosen at run time is a named axis, `batch` or
`requests` and `probes`; all other lengths are constants of the model folder.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedOpsetsPass
from torch import Tensor, nn

from safelight.engine.eager import Preprocessing
from safelight.engine.model_folder import SECOND_TEXT, ModelFolder
from safelight.errors import BundleError, ExportError
from safelight.manifest import TensorSpec

OPSET = 20
TRACED = {"batch": 2, "requests": 2, "probes": 3}  # 0 and 1 would be baked into the graph


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths that a model folder fixes: token ids of all text encoders, rows of the conditioning that they
    make and its width, the width of the pooled embedding, latents (c, h, w), the edges of the picture and of
    the checker's input in px, concepts, special-care concepts, and the width of image embeddings.
    """

    ids: int
    rows: int
    width: int
    pooled: int
    latents: tuple[int, int, int]
    picture: int
    checker: int
    concepts: int
    special: int
    embedding: int

    @classmethod
    def read(cls, folder: ModelFolder, window: int) -> "Sizes":
        """From the configurations and the checker's tensors. Raises BundleError where the parts do not fit
        together.
        """
        texts = ("text_encoder", SECOND_TEXT) if folder.is_paired else ("text_encoder",)
        widths = [folder.whole(part, "hidden_size") for part in texts]
        width, added = sum(widths), folder.pooled()
        edge, channels = folder.whole("unet", "sample_size"), folder.whole("unet", "in_channels")
        for part, key, wanted in (
            ("unet", "cross_attention_dim", width),
            ("vae", "latent_channels", channels),
        ):
            if (got := folder.whole(part, key)) != wanted:
                raise BundleError(
                    f"{folder.path / part}/config.json: {key} must be {wanted}; got {got}; take all parts "
                    "from one model"
                )
        if added > width:
            raise BundleError(
                f"{folder.path / SECOND_TEXT}/config.json: projection_dim {added} exceeds the width {width} "
                "of the hidden states, beside which it travels; use a model of the SDXL class"
            )
        concepts, embedding = folder.shape("safety_checker", "concept_embeds")
        special, _ = folder.shape("safety_checker", "special_care_embeds")
        return cls(
            ids=window * len(texts),
            rows=window + bool(added),
            width=width,
            pooled=added or width,
            latents=(channels, edge, edge),
            picture=folder.picture(),
            checker=Preprocessing.read(folder).size,
            concepts=concepts,
            special=special,
            embedding=embedding,
        )


Tensors = tuple[TensorSpec, ...]


def signature(graph: str, sizes: Sizes) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of a graph, in the order of its eager module's `forward`."""
    tokens, edge = (sizes.rows, sizes.width), sizes.picture
    picture, clip = (3, edge, edge), (3, sizes.checker, sizes.checker)
    every: dict[str, tuple[Tensors, Tensors]] = {
        "text_encoder": (
            (TensorSpec("input_ids", "int64", ("batch", sizes.ids)),),
            (_float("last_hidden_state", "batch", *tokens), _float("pooler_output", "batch", sizes.pooled)),
        ),
        "unet": (
            (
                _float("sample", "batch", *sizes.latents),
                _float("timestep"),
                _float("encoder_hidden_states", "batch", *tokens),
            ),
            (_float("out_sample", "batch", *sizes.latents),),
        ),
        "vae_decoder": (
            (_float("latent_sample", "batch", *sizes.latents),),
            (_float("sample", "batch", *picture),),
        ),
        "vae_encoder": (
            (_float("sample", "batch", *picture),),
            (_float("latent_sample", "batch", *sizes.latents),),
        ),
        "safety_checker": (
            (_float("clip_input", "batch", *clip), _float("images", "batch", edge, edge, 3)),
            (
                _float("out_images", "batch", edge, edge, 3),
                TensorSpec("has_nsfw_concepts", "bool", ("batch",)),
                _float("margins", "batch", sizes.concepts),
                _float("image_embeds", "batch", sizes.embedding),
            ),
        ),
        "detector": _detector(sizes, tokens, _float("images", "requests", "probes", *picture)),
        "detector_latent": _detector(sizes, tokens, _float("x0", "requests", "probes", *sizes.latents)),
        "latent_checker": (
            (_float("latents", "batch", *sizes.latents),),
            (_float("margins", "batch", sizes.concepts),),
        ),
        "redirector": (
            (_float("hidden", "batch", *tokens),),
            (_float("redirected", "batch", *tokens),),
        ),
    }
    return every[graph]


def _detector(sizes: Sizes, tokens: tuple[int, int], shown: TensorSpec) -> tuple[Tensors, Tensors]:
    """A detector's tensors; `shown` is what its checker looked at."""
    probe = ("requests", "probes")
    inputs = (
        TensorSpec("input_ids", "int64", ("requests", sizes.ids)),
        TensorSpec("rotate_mask", "bool", ("requests", sizes.rows)),
        _float("prompt_u", *probe, *tokens),
        _float("prompt_v", *probe, *tokens),
        _float("angle", *probe),
        _float("phase", *probe),
        _float("latents", *probe, *sizes.latents),
        TensorSpec("need", "int64", ("requests",)),
    )
    outputs = (
        _float("margins", *probe, sizes.concepts),
        TensorSpec("flagged", "bool", probe),
        TensorSpec("finite", "bool", probe),
        _float("score", "requests"),
        TensorSpec("blocked", "bool", ("requests",)),
        shown,
    )
    return inputs, outputs


def _float(name: str, *axes: str | int) -> TensorSpec:
    return TensorSpec(name, "float32", axes)


def trace(module: nn.Module, graph: str, sizes: Sizes) -> ir.Model:
    """The ONNX form of a module: standard operators alone, names and axes of `signature`, no source lines.

    Its initialisers share memory with the module. Raises ExportError where its tensors are not as declared.
    """
    inputs, outputs = signature(graph, sizes)
    axes = [{index: axis for index, axis in enumerate(spec.axes) if isinstance(axis, str)} for spec in inputs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # inputs share axes on purpose
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch
        try:
            program = torch.onnx.export(
                module,
                tuple(_example(spec) for spec in inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=tuple(axes),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as fault:
            reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
            raise ExportError(f"{graph} cannot be traced ({reason}); use another torch") from fault
    if program is None:
        raise ExportError(f"{graph}: torch.onnx.export returned no program; use torch 2.11 or later")
    model = program.model
    ClearMetadataAndDocStringPass()(model)
    RemoveUnusedOpsetsPass()(model)
    for specs, values in ((inputs, model.graph.inputs), (outputs, model.graph.outputs)):
        if [spec.name for spec in specs] != [value.name for value in values]:
            names = [value.name for value in values]
            raise ExportError(
                f"{graph}: tensors must be {[spec.name for spec in specs]}; got {names}; use another torch"
            )
        for spec, value in zip(specs, values, strict=True):
            _name_axes(graph, spec, value)
    if odd := sorted({node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} - {""}):
        raise ExportError(f"{graph}: operators must be standard ONNX; got {odd[0]!r}; use another torch")
    return model


def _example(spec: TensorSpec) -> Tensor:
    shape = [TRACED[axis] if isinstance(axis, str) else axis for axis in spec.axes]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _name_axes(graph: str, spec: TensorSpec, value: ir.Value) -> None:
    """Give an input or output the declared axes; torch may name a computed one by an expression."""
    found = None if value.shape is None else tuple(value.shape)
    same = found is not None and len(found) == len(spec.axes)
    for declared, axis in zip(spec.axes, found or (), strict=False):
        same = same and (declared == axis if isinstance(axis, int) else isinstance(declared, str))
    if not same or value.dtype != ir.DataType.from_numpy(np.dtype(spec.dtype)):
        raise ExportError(
            f"{graph}: {spec.name} must be {spec.dtype} {list(spec.axes)}; got {value.dtype} {value.shape}; "
            "use another torch"
        )
    value.shape = ir.Shape(spec.axes)
