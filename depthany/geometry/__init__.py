"""Pure tensor maths: masked reductions, alignment, disparity, cameras and resampling."""
