/* The Open MPI side of ../collective.py and ../nodes.py: the same calls, timed in the same way as
 * `lockstep bench collective` does: batches of calls after a barrier, a batch as long as on the
 * slowest rank, the median over batches. float32, in place where MPI can; all_reduce_apart is for
 * its component han, which crashes in place (4.1).
 *
 *   mpirun -n 2 openmpi OPERATION:BYTES:BATCH:BATCHES …     one JSON line for each on rank 0 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int rank, ranks;

static void call(const char* operation, float* data, float* out, int count) {
  if (strcmp(operation, "all_reduce") == 0)
    MPI_Allreduce(MPI_IN_PLACE, data, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  else if (strcmp(operation, "all_reduce_apart") == 0)
    MPI_Allreduce(data, out, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  else if (strcmp(operation, "broadcast") == 0)
    MPI_Bcast(data, count, MPI_FLOAT, 0, MPI_COMM_WORLD);
  else if (strcmp(operation, "all_gather") == 0)
    MPI_Allgather(MPI_IN_PLACE, 0, MPI_FLOAT, data, count / ranks, MPI_FLOAT, MPI_COMM_WORLD);
  else if (strcmp(operation, "reduce_scatter") == 0)
    MPI_Reduce_scatter_block(data, out, count / ranks, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  else if (strcmp(operation, "reduce") == 0)
    MPI_Reduce(rank == 0 ? MPI_IN_PLACE : data, data, count, MPI_FLOAT, MPI_SUM, 0,
               MPI_COMM_WORLD);
  else if (strcmp(operation, "all_to_all") == 0)
    MPI_Alltoall(data, count / ranks, MPI_FLOAT, out, count / ranks, MPI_FLOAT, MPI_COMM_WORLD);
  else
    MPI_Barrier(MPI_COMM_WORLD);
}

static int compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static void* memory(size_t bytes) {
  void* data = NULL;
  if (posix_memalign(&data, 64, bytes + 64) != 0) MPI_Abort(MPI_COMM_WORLD, 1);
  memset(data, 0, bytes + 64);
  return data;
}

static void measure(const char* operation, long bytes, long batch, long batches) {
  const int count = (int)(bytes / 4);
  float* data = memory(bytes);
  float* out = memory(bytes);
  double* us = memory(batches * sizeof(double));
  for (long i = 0; i < (batch < 5 ? 5 : batch); ++i) call(operation, data, out, count);
  for (long b = 0; b < batches; ++b) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double start = MPI_Wtime();
    for (long i = 0; i < batch; ++i) call(operation, data, out, count);
    us[b] = (MPI_Wtime() - start) * 1e6 / batch;
  }
  MPI_Allreduce(MPI_IN_PLACE, us, (int)batches, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  const int apart = strcmp(operation, "all_reduce_apart") == 0;
  if (apart || strcmp(operation, "all_reduce") == 0) {
    for (int i = 0; i < count; ++i) data[i] = rank + 1;
    call(operation, data, out, count);
    for (int i = 0; i < count; ++i)
      if ((apart ? out : data)[i] != ranks * (ranks + 1) / 2) MPI_Abort(MPI_COMM_WORLD, 1);
  }
  qsort(us, batches, sizeof(double), compare);
  if (rank == 0)
    printf("{\"operation\": \"%s\", \"ranks\": %d, \"bytes\": %ld, \"time_us\": %.4f, "
           "\"min_us\": %.4f, \"max_us\": %.4f}\n",
           operation, ranks, bytes, (us[(batches - 1) / 2] + us[batches / 2]) / 2, us[0],
           us[batches - 1]);
  free(data);
  free(out);
  free(us);
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  for (int i = 1; i < argc; ++i) {
    char operation[32];
    long bytes, batch, batches;
    if (sscanf(argv[i], "%31[^:]:%ld:%ld:%ld", operation, &bytes, &batch, &batches) != 4)
      MPI_Abort(MPI_COMM_WORLD, 2);
    measure(operation, bytes, batch, batches);
  }
  MPI_Finalize();
  return 0;
}
