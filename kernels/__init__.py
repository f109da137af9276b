"""Fused Triton kernels for fine-tuning, and how they are put on a loaded model. Imports torch and triton alone.

rms_norm  glu  rope  linear_cross_entropy  nf4  lora_linear     one operation each, forward and backward
launch                                                          shapes, tiles and devices, for all of them
patch     replace                                               what is put on a model, and the new forwards
recognise adapters  rotary                                      what a module does, found by looking and running
selfcheck                                                       proof, against float64, before anything is used
"""
