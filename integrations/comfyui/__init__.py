"""Nodes for ComfyUI: bundles of few-step models, stage by stage, with ComfyUI's own conditioning, latents and images.

ComfyUI loads this folder from `custom_nodes`; README.md says how. `nodes` holds the nodes, `host` what they need of
ComfyUI, and `values` how its values become ours.
"""

from .nodes import NODES

NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in NODES}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
