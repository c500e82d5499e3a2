"""Norm classes of Hugging Face transformers on our kernels, by what they compute.

`class_for` gives the class that takes the place of one of theirs: a subclass of theirs, of the same name. It is made
when it is first met, or asked for by name, so that only those who use transformers import it; pickle and deepcopy find
it here like any other class.

x, of dtype d, stands for the input, w for the weight, norm(x) for x / sqrt(mean(x^2) + eps) in float32. What a form
does not cover (other dtypes, a weight of another shape), and what the Triton kernels do not run (a CPU), goes to the
forward of the class that was there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from kernels.backend import why_not_triton
from kernels.layer_norm.api import layer_norm, rms_norm

__all__ = ["class_for"]


class Form(torch.nn.Module):
    """What a norm computes. numerics: see `kernels.replace.Replaced`."""

    numerics = "bitwise"
    eps_name: str  # the attribute that holds eps
    weight: Any  # this and the rest: as the class of transformers has them, or has not
    bias: Any
    normalized_shape: Any
    with_scale: bool
    data_format: str

    def covers(self, x: torch.Tensor) -> bool:
        """Whether the form says what the class before gives for x."""
        return self.weight.shape == x.shape[-1:]

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """The form by our functions."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> Any:
        """By our kernels where they run, else as before."""
        if why_not_triton(x.device, x.dtype) or not self.covers(x):
            return super().forward(x)
        return self.fused(x).to(x.dtype)


def eps_of(norm: Any) -> float:
    """What is added to the mean square, or to the variance."""
    return getattr(norm, norm.eps_name)


def beside(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight as our functions take it beside x, without loss."""
    return weight if weight.dtype == x.dtype else weight.float()


class Rounded(Form):
    """w d(norm(x)). Ours rounds once, to d, after the weight."""

    numerics = "one rounding less"

    def covers(self, x: torch.Tensor) -> bool:
        """Of two dtypes, the result may have the weight's."""
        return super().covers(x) and self.weight.dtype == x.dtype

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return rms_norm(x, x.shape[-1:], self.weight, eps_of(self))


class Wide(Form):
    """d(w norm(x)), the weight in float32."""

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return rms_norm(x, x.shape[-1:], beside(x, self.weight), eps_of(self))


class Offset(Form):
    """d((1 + w) norm(x)), 1 + w in float32."""

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return rms_norm(x, x.shape[-1:], 1.0 + self.weight.float(), eps_of(self))


class Bare(Form):
    """d(norm(x))."""

    def covers(self, x: torch.Tensor) -> bool:
        """Anything."""
        return True

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return rms_norm(x, x.shape[-1:], None, eps_of(self))


class BareRounded(Bare):
    """x d(1 / sqrt(mean(x^2) + eps)). Ours rounds once."""

    numerics = "one rounding less"


class Switched(Form):
    """As `Wide` with_scale, else as `Bare`."""

    def covers(self, x: torch.Tensor) -> bool:
        """As one or the other."""
        return not self.with_scale or super().covers(x)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return rms_norm(x, x.shape[-1:], beside(x, self.weight) if self.with_scale else None, eps_of(self))


class Centred(Form):
    """d(w layer_norm(x)), the weight in float32, without a bias."""

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return layer_norm(x, x.shape[-1:], beside(x, self.weight), None, eps_of(self))


class CentredBare(Bare):
    """d(layer_norm(x)), eps 1e-5."""

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return layer_norm(x, self.normalized_shape, eps=1e-5)


class CentredRounded(Rounded):
    """w d(layer_norm(x)) + bias. Ours rounds once."""

    numerics = "two roundings less"

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N), as x."""
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, eps_of(self))


class Channels(Form):
    """`torch.nn.LayerNorm`, of (B, H, W, N), or where data_format is channels_first, of (B, N, H, W)."""

    def covers(self, x: torch.Tensor) -> bool:
        """Where PyTorch's own takes a weight of another dtype, it is on its own."""
        return self.weight is None or self.weight.dtype == x.dtype

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """As x."""
        is_last = self.data_format != "channels_first"
        rows = x if is_last else x.permute(0, 2, 3, 1)
        rows = layer_norm(rows, self.normalized_shape, self.weight, self.bias, eps_of(self))
        return rows if is_last else rows.permute(0, 3, 1, 2)


# By form, the classes of transformers 5.24 as folder.class: the class is in transformers.models.folder.modeling_folder.
# `pytest -m long tests/test_fuse.py` compares this with the transformers that is installed.
CLASSES: dict[type[Form], str] = {
    Rounded: """
        aimv2.Aimv2RMSNorm apertus.ApertusRMSNorm apertus1p5.Apertus1p5TextRMSNorm arcee.ArceeRMSNorm
        aria.AriaTextRMSNorm axk1.AXK1RMSNorm axk2.AXK2RMSNorm bailing_hybrid.BailingHybridRMSNorm
        bamba.BambaRMSNorm bitnet.BitNetRMSNorm blt.BltRMSNorm chameleon.ChameleonRMSNorm clvp.ClvpRMSNorm
        cohere2_moe.Cohere2MoeRMSNorm cosmos3_edge.Cosmos3EdgeTextRMSNorm csm.CsmRMSNorm cwm.CwmRMSNorm
        deepseek_ocr2.DeepseekOcr2TextRMSNorm deepseek_ocr2.DeepseekOcr2VisionRMSNorm
        deepseek_v2.DeepseekV2RMSNorm deepseek_v3.DeepseekV3RMSNorm deepseek_v32.DeepseekV32RMSNorm
        deimv2.Deimv2RMSNorm dia.DiaRMSNorm diffllama.DiffLlamaRMSNorm doge.DogeRMSNorm dots1.Dots1RMSNorm
        dots3_note.Dots3NoteRMSNorm emu3.Emu3RMSNorm ernie4_5.Ernie4_5RMSNorm ernie4_5_moe.Ernie4_5_MoeRMSNorm
        ernie4_5_vl_moe.Ernie4_5_VLMoeRMSNorm eurobert.EuroBertRMSNorm evolla.EvollaRMSNorm
        exaone4.Exaone4RMSNorm exaone4_5.Exaone4_5_RMSNorm exaone_moe.ExaoneMoeRMSNorm falcon_h1.FalconH1RMSNorm
        falcon_mamba.FalconMambaRMSNorm glm.GlmRMSNorm glm4.Glm4RMSNorm glm4_moe.Glm4MoeRMSNorm
        glm4_moe_lite.Glm4MoeLiteRMSNorm glm4v.Glm4vRMSNorm glm4v_moe.Glm4vMoeRMSNorm
        glm4v_moe.Glm4vMoeTextRMSNorm glm5_next.Glm5NextRMSNorm glm5_next.Glm5NextTextRMSNorm
        glm_image.GlmImageRMSNorm glm_moe_dsa.GlmMoeDsaRMSNorm glm_ocr.GlmOcrRMSNorm granite.GraniteRMSNorm
        granite4_vision.Granite4VisionTextRMSNorm granite_docling.GraniteDoclingTextRMSNorm
        granite_swa.GraniteSWARMSNorm granitemoe.GraniteMoeRMSNorm granitemoe_swa.GraniteMoeSWARMSNorm
        granitemoehybrid.GraniteMoeHybridRMSNorm granitemoeshared.GraniteMoeSharedRMSNorm
        higgs_audio_v2.HiggsAudioV2RMSNorm hunyuan_v1_dense.HunYuanDenseV1RMSNorm
        hunyuan_v1_moe.HunYuanMoEV1RMSNorm hunyuan_vl.HunYuanVLRMSNorm hy_v3.HYV3RMSNorm hy_v4.HYV4RMSNorm
        hy_v4_vl.HYV4VLRMSNorm hyperclovax.HyperCLOVAXRMSNorm idefics.IdeficsRMSNorm idefics2.Idefics2RMSNorm
        idefics3.Idefics3RMSNorm inkling.InklingRMSNorm internvl.InternVLVisionRMSNorm jamba.JambaRMSNorm
        jetmoe.JetMoeRMSNorm kimi_linear.KimiLinearRMSNorm kolibri1.Kolibri1RMSNorm kosmos2_5.Kosmos2_5LayerNorm
        laguna.LagunaRMSNorm lfm2.Lfm2RMSNorm lfm2_moe.Lfm2MoeRMSNorm lfm3.Lfm3RMSNorm
        lfm3_vl.Lfm3VlVisionRMSNorm lighton_ocr.LightOnOcrRMSNorm llama.LlamaRMSNorm llama4.Llama4TextRMSNorm
        longcat_flash.LongcatFlashRMSNorm longt5.LongT5LayerNorm mamba.MambaRMSNorm mamba2.Mamba2RMSNorm
        mellum.MellumRMSNorm mimo_v2_flash.MiMoV2FlashRMSNorm minicpm3.MiniCPM3RMSNorm minimax.MiniMaxRMSNorm
        minimax_m2.MiniMaxM2RMSNorm ministral.MinistralRMSNorm ministral3.Ministral3RMSNorm
        mistral.MistralRMSNorm mistral3.Mistral3RMSNorm mistral4.Mistral4RMSNorm
        mistral_large4.MistralLarge4RMSNorm mixtral.MixtralRMSNorm mllama.MllamaTextRMSNorm molmo2.Molmo2RMSNorm
        mt5.MT5LayerNorm muse_glimmer_assistant.MuseGlimmerAssistantRMSNorm neucodec.NeuCodecRMSNorm
        olmoe.OlmoeRMSNorm ovis2.Ovis2RMSNorm paddleocr_vl.PaddleOCRRMSNorm pe_audio.PeAudioEncoderRMSNorm
        pe_audio_video.PeAudioVideoEncoderRMSNorm pe_video.PeVideoEncoderRMSNorm phi3.Phi3RMSNorm
        phi4_multimodal.Phi4MultimodalRMSNorm pix2struct.Pix2StructLayerNorm pixtral.PixtralRMSNorm
        pop2piano.Pop2PianoLayerNorm qianfan_ocr.QianfanOCRVisionRMSNorm qwen2.Qwen2RMSNorm
        qwen2_5_omni.Qwen2_5OmniRMSNorm qwen2_5_vl.Qwen2_5_VLRMSNorm qwen2_moe.Qwen2MoeRMSNorm
        qwen2_vl.Qwen2VLRMSNorm qwen3.Qwen3RMSNorm qwen3_moe.Qwen3MoeRMSNorm
        qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm qwen3_omni_moe.Qwen3OmniMoeRMSNorm
        qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm
        qwen3_vl.Qwen3VLTextRMSNorm qwen3_vl_moe.Qwen3VLMoeTextRMSNorm sapiens2.Sapiens2RMSNorm
        seed_oss.SeedOssRMSNorm smollm3.SmolLM3RMSNorm solar_open.SolarOpenRMSNorm
        switch_transformers.SwitchTransformersLayerNorm t5.T5LayerNorm timesfm.TimesFmRMSNorm
        timesfm2_5.TimesFm2_5RMSNorm udop.UdopLayerNorm ultrabert.UltrabertRMSNorm ultravbert.UltraVBertRMSNorm
        umt5.UMT5LayerNorm unlimited_ocr.UnlimitedOcrTextRMSNorm vibevoice.VibeVoiceRMSNorm
        vibevoice_acoustic_tokenizer.VibeVoiceAcousticTokenizerRMSNorm vibevoice_asr.VibeVoiceAsrRMSNorm
        voxtral_realtime.VoxtralRealtimeRMSNorm xcodec2.Xcodec2RMSNorm youtu.YoutuRMSNorm zamba.ZambaRMSNorm
        zamba2.Zamba2RMSNorm zaya.ZayaRMSNorm
    """,
    Wide: """
        afmoe.AfmoeRMSNorm beam.BeamRMSNorm deepseek_v4.DeepseekV4RMSNorm flex_olmo.FlexOlmoRMSNorm
        flint.FlintRMSNorm gpt_oss.GptOssRMSNorm helium.HeliumRMSNorm inkling2.Inkling2RMSNorm
        inkling2_loop.Inkling2LoopRMSNorm kyutai_speech_to_text.KyutaiSpeechToTextRMSNorm
        lara_mini.LaraMiniRMSNorm moshi.MoshiRMSNorm nemotron_h.NemotronHRMSNorm
        nemotron_h_omni.NemotronH_Omni_RMSNorm olmo2.Olmo2RMSNorm olmo3.Olmo3RMSNorm
        olmo_hybrid.OlmoHybridRMSNorm openai_privacy_filter.OpenAIPrivacyFilterRMSNorm
    """,
    Switched: """
        diffusion_gemma.DiffusionGemmaRMSNorm embedding_gemma2.EmbeddingGemma2RMSNorm gemma3n.Gemma3nRMSNorm
        gemma4.Gemma4RMSNorm gemma4_unified.Gemma4UnifiedRMSNorm muse_glimmer.MuseGlimmerRMSNorm
        muse_spark.MuseSparkRMSNorm neomme.NeoMMERMSNorm
    """,
    Offset: """
        gemma.GemmaRMSNorm gemma2.Gemma2RMSNorm gemma3.Gemma3RMSNorm minimax_m3_vl.MiniMaxM3VLRMSNorm
        muse_glimmer.MuseGlimmerTextCenteredRMSNorm qwen3_5.Qwen3_5RMSNorm qwen3_5_moe.Qwen3_5MoeRMSNorm
        qwen3_next.Qwen3NextRMSNorm recurrent_gemma.RecurrentGemmaRMSNorm step3p7.Step3p7RMSNorm
        t5gemma.T5GemmaRMSNorm t5gemma2.T5Gemma2RMSNorm vaultgemma.VaultGemmaRMSNorm
    """,
    Bare: """
        esmfold2.EsmFold2RMSNorm falcon_mamba.FalconMambaWeightlessRMSNorm hrm_text.HrmTextRMSNorm
        inkling2.Inkling2UnweightedRMSNorm inkling2_loop.Inkling2LoopUnweightedRMSNorm llama4.Llama4TextL2Norm
        nanochat.NanoChatRMSNorm
    """,
    BareRounded: """
        deepseek_v4.DeepseekV4UnweightedRMSNorm glm5_next.Glm5NextTextUnweightedRMSNorm
    """,
    Centred: """
        cohere.CohereLayerNorm cohere2.Cohere2LayerNorm cohere2_moe.Cohere2MoeLayerNorm
        cohere_compass.CohereCompassLayerNorm
    """,
    CentredBare: """
        olmo.OlmoLayerNorm
    """,
    CentredRounded: """
        deberta.DebertaLayerNorm
    """,
    Channels: """
        convnext.ConvNextLayerNorm convnextv2.ConvNextV2LayerNorm deepseek_ocr2.DeepseekOcr2SamLayerNorm
        deepseek_vl_hybrid.DeepseekVLHybridLayerNorm dinov3_convnext.DINOv3ConvNextLayerNorm
        edgetam.EdgeTamLayerNorm edgetam_video.EdgeTamVideoLayerNorm got_ocr2.GotOcr2LayerNorm
        lw_detr.LwDetrLayerNorm pp_formulanet.PPFormulaNetLayerNorm rf_detr.RfDetrLayerNorm sam.SamLayerNorm
        sam2.Sam2LayerNorm sam2_video.Sam2VideoLayerNorm sam3_tracker.Sam3TrackerLayerNorm
        sam3_tracker_video.Sam3TrackerVideoLayerNorm sam_hq.SamHQLayerNorm seggpt.SegGptLayerNorm
        slanext.SLANeXtLayerNorm unlimited_ocr.UnlimitedOcrSamLayerNorm
    """,
}
FORMS: dict[str, tuple[type[Form], str]] = {
    name.rpartition(".")[2]: (form, name.partition(".")[0]) for form in CLASSES for name in CLASSES[form].split()
}


def class_for(original: type) -> Any:
    """Our subclass of `original`, a class of transformers; None where it is not in the table.

    Raises:
        ValueError: `original` is in the table, and computes something else: another version of transformers.
    """
    name = original.__qualname__
    if name not in FORMS or original.__module__ != where(name):
        return None
    ours = __getattr__(name)
    return ours if issubclass(ours, original) else None


def where(name: str) -> str:
    """The module of transformers that has the class of that name."""
    folder = FORMS[name][1]
    return f"transformers.models.{folder}.modeling_{folder}"


def __getattr__(name: str) -> Any:
    """Our class in the place of theirs of that name, kept under it."""
    if name not in FORMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        original = getattr(importlib.import_module(where(name)), name)
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"{name} needs {where(name)}.{name}, which is not there: {error}") from error
    form = FORMS[name][0]
    ours: Any = type(name, (form, original), {"__module__": __name__, "__doc__": form.__doc__})
    for ours.eps_name in "variance_epsilon", "eps":
        if computes_the_same(ours, original):
            return globals().setdefault(name, ours)
    raise ValueError(f"{where(name)}.{name} no longer computes what the table in {__name__} says: {form.__doc__}")


@torch.no_grad()
def computes_the_same(ours: Any, original: Any) -> bool:
    """Whether both give the same on a few numbers, by a module that has what any of the forms reads."""
    module: Any = ours.__new__(ours)
    torch.nn.Module.__init__(module)
    module.weight, module.bias = (
        torch.nn.Parameter(torch.linspace(start, 1.5, 8, dtype=torch.float32, device="cpu")) for start in (-1.0, 0.5)
    )
    module.with_scale, module.data_format, module.normalized_shape = True, "channels_last", (8,)
    setattr(module, module.eps_name, 0.25)
    x = torch.linspace(-1.0, 3.0, 24, dtype=torch.float32, device="cpu").sin().view(1, 3, 1, 8)
    try:
        expected = original.forward(module, x)
    except AttributeError:  # it reads what the form does not have
        return False
    return torch.allclose(module.fused(x), expected, rtol=1e-4, atol=1e-5)
