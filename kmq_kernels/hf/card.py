"""The card of a quantized model."""

from __future__ import annotations

MODEL_CARD = """\
---
library_name: kmq_kernels
tags: [kmq, quantized]
---
A model quantized with `kmq_kernels`: {summary}.

Import the package before loading, or transformers cannot read the packed weights and starts from random ones:

```python
import kmq_kernels as kmq

model = kmq.load("path/to/this/folder")
# or, once kmq_kernels is imported:
# AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
```
"""
