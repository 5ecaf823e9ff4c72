"""Simulations, in torch on the CPU, of the int8 schemes of LLM.int8() (arXiv 2208.07339), for the linear layers of the decoder blocks
(every nn.Linear but lm_head). Inputs are rounded to fp16, integer products are exact, the rest is fp32. Used by perplexity.py.

    absmax            one absmax scale per tensor, inputs and weights
    zeropoint         affine, per tensor, both
    rowwise           inputs one absmax scale per row, weights per tensor
    vectorwise        inputs per row, weights per output feature, no decomposition
    zeropoint-vw      affine, inputs per row, weights per output feature
    llm.int8          vectorwise, with the outlier columns (any |x| >= threshold) in fp16 with the fp16 weights: the paper
    llm.int8-rowwise  rowwise, with the same outlier columns
    llm.int8-bnb      as bitsandbytes with has_fp16_weights=False: the row scale is over all |x| below the threshold, outlier columns too,
                      and the outlier columns' weights are dequantised from int8
"""
import torch
import torch.nn as nn

SCHEMES = ("absmax", "zeropoint", "rowwise", "vectorwise", "zeropoint-vw", "llm.int8-rowwise", "llm.int8", "llm.int8-bnb")


def absmax_codes(x, dim=None):
    """Codes and the scale that turns them back; torch.round rounds half to even."""
    absmax = x.abs().amax() if dim is None else x.abs().amax(dim=dim, keepdim=True)
    absmax = absmax.clamp_min(1e-12)
    return torch.round(x * (127.0 / absmax)), absmax / 127.0


def through_zeropoint(x, dim=None):
    """x as affine (zero-point) int8 would have it."""
    low = (x.amin() if dim is None else x.amin(dim=dim, keepdim=True)).clamp_max(0)
    high = (x.amax() if dim is None else x.amax(dim=dim, keepdim=True)).clamp_min(0)
    factor = 254.0 / (high - low).clamp_min(1e-12)
    zero = torch.round(-127.0 - low * factor)
    return ((torch.round(x * factor) + zero).clamp(-127, 127) - zero) / factor


class QuantisedLinear(nn.Module):
    def __init__(self, linear, scheme, threshold):
        super().__init__()
        self.weight = linear.weight.data.half().float()
        self.bias = None if linear.bias is None else linear.bias.data
        self.scheme, self.threshold = scheme, threshold
        self.row_codes, self.row_scale = absmax_codes(self.weight, 1)          # one scale per output feature
        self.codes, self.scale = absmax_codes(self.weight)
        self.affine = through_zeropoint(self.weight) if scheme == "zeropoint" else through_zeropoint(self.weight, 1)
        self.outlier_columns = self.calls = 0

    def forward(self, x):
        shape = x.shape
        y = self.product(x.reshape(-1, shape[-1]).half().float())
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*shape[:-1], -1)

    def product(self, x):
        if self.scheme == "absmax":
            codes, scale = absmax_codes(x)
            return (codes @ self.codes.t()) * (scale * self.scale)
        if self.scheme == "rowwise":
            codes, scale = absmax_codes(x, 1)
            return (codes @ self.codes.t()) * (scale * self.scale)
        if self.scheme == "vectorwise":
            codes, scale = absmax_codes(x, 1)
            return (codes @ self.row_codes.t()) * scale * self.row_scale.t()
        if self.scheme == "zeropoint":
            return through_zeropoint(x) @ self.affine.t()
        if self.scheme == "zeropoint-vw":
            return through_zeropoint(x, 1) @ self.affine.t()
        assert self.scheme in ("llm.int8", "llm.int8-bnb", "llm.int8-rowwise"), self.scheme
        outliers = x.abs() >= self.threshold
        columns = outliers.any(0)
        self.outlier_columns += int(columns.sum())
        self.calls += 1
        if self.scheme == "llm.int8-bnb":
            scale = x.masked_fill(outliers, 0).abs().amax(1, keepdim=True).clamp_min(1e-12) / 127.0
            codes = torch.round(x.masked_fill(outliers, 0) / scale)
            codes[:, columns] = 0
            kept = (self.row_codes[:, columns] * self.row_scale).half().float()
            return (codes @ self.row_codes.t()) * scale * self.row_scale.t() + x[:, columns] @ kept.t()
        rest = x.clone()
        rest[:, columns] = 0
        codes, scale = absmax_codes(rest, 1)
        if self.scheme == "llm.int8":
            y = (codes @ self.row_codes.t()) * scale * self.row_scale.t()
        else:
            y = (codes @ self.codes.t()) * (scale * self.scale)
        return y + x[:, columns] @ self.weight[:, columns].t()


def quantise(model, scheme, threshold=6.0):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, QuantisedLinear(child, scheme, threshold))
    return model
