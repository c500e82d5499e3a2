from torch.nn.functional import layer_norm
__all__ = ["layer_norm"]
