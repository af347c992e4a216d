"""Megatron-core's indexed datasets (.bin of tokens, .idx of document ends), the format that tokens are kept in.

Importing Megatron-core warns about the GPU libraries that it does without; none of what would use them is used here.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
