"""Plan -> TorchRec. The only room of `sharding` that may name private parts of TorchRec and FBGEMM."""
