// See cuda_runtime.h in this folder.

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_COOPERATIVE_GROUPS_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_COOPERATIVE_GROUPS_H_

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive();
  static void barrier_wait();
  template <class T>
  static T* map_shared_rank(T* shared, int rank) {
    return static_cast<T*>(MapSharedRank(shared, rank));
  }

 private:
  static const void* MapSharedRank(const void* shared, int rank_number);
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_COOPERATIVE_GROUPS_H_
