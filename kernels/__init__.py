"""Fused Triton kernels for fine-tuning, and how they are put on a loaded model. Imports torch and triton alone.

rms_norm  glu  lora_glu  rope  linear_cross_entropy  nf4  fp8  adamw  one operation each, forward and backward
lora_add                                                              what adapter and residual add to a product
blockwise                                                             states of an optimiser in 8 bits, block by block
lora_linear  projection  fp8_projection  attention                    products put together by hand
decoder_layer  decoder_mlp  offload                                   a whole layer, what it keeps, and where that waits
launch                                                                shapes, tiles and devices, for all of them
patch     replace  layers                                             what is put on a model, and the new forwards
recognise adapters  rotary                                            what a module does, found by looking and running
selfcheck layerproof  faster                                          proof, against float64, before anything is used
"""
