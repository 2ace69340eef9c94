// Part of bitfront: wires from one array to another.
#ifndef NNET_GATHER_H_
#define NNET_GATHER_H_

namespace nnet {

// res[i] is data[CONFIG_T::from(i)], or 0 where that is negative.
template <class data_T, class res_T, typename CONFIG_T>
void gather(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE
    for (int i = 0; i < CONFIG_T::n_out; i++) {
        #pragma HLS UNROLL
        const int from = CONFIG_T::from(i);
        if (from < 0) {
            res[i] = 0;
        } else {
            res[i] = data[from];
        }
    }
}

} // namespace nnet

#endif
