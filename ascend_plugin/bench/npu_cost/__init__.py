"""``bench npu-cost``: launches, bytes and a roofline of a decode step, layer by layer."""
