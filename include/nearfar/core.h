/* ---- nearfar core: what every kernel shares ----
 *
 * One argument struct for every operator and backend; zero means default. Packed sequences stand behind one another in
 * one batch entry, sequence s from cu_tokens[s] to cu_tokens[s + 1].
 */
#if defined(NF_CORE_ABI) && NF_CORE_ABI != 4
#error "two nearfar headers of different core ABI in one file: generate both with the same nearfar version"
#endif
#ifndef NF_CORE_ABI
#define NF_CORE_ABI 4

#include <stddef.h>
#include <stdint.h>

#ifndef __GNUC__
#error "nearfar needs GCC, Clang or a compiler that speaks their vector extension"
#endif
#define NF_UNUSED __attribute__((unused))

#ifdef __cplusplus
extern "C" {
#endif

/* Alignment of workspaces, projections and states, and what their sizes are multiples of. */
#define NF_ALIGN 64

/* Name, value, what was wrong. */
#define NF_STATUS_LIST(X) \
    X(NF_OK, 0, "ok") \
    X(NF_E_NULL, -1, \
      "a pointer that this call needs is null (a tensor, workspace, projection, matrix, sample, pattern or its list, " \
      "state, lse)") \
    X(NF_E_SIZE, -2, "batch and heads (and a sample's tokens) must be at least 1, and no size negative") \
    X(NF_E_HEADS, -3, "heads must be a multiple of kv_heads") \
    X(NF_E_TOKENS, -4, \
      "causal and decode need kv_tokens >= q_tokens; decode with a state needs kv_tokens = q_tokens; NF_NO_KEYS " \
      "needs 0") \
    X(NF_E_OVERFLOW, -5, "a product of sizes and strides exceeds the address range") \
    X(NF_E_STRIDE, -6, \
      "a stride is negative, below a row (the head dim; of v and out the value dim) or a projection, or lets rows of " \
      "out overlap") \
    X(NF_E_SCALE, -7, "scale must be from 0 to 1e30 (0: the default)") \
    X(NF_E_MASK, -8, \
      "mask must be NF_CAUSAL or NF_FULL; decode, hybrid and a state with a window are causal only, softmaxqk is " \
      "full only") \
    X(NF_E_PACKED, -9, "cu_tokens must rise from 0 to q_tokens = kv_tokens, with batch 1") \
    X(NF_E_SPLIT, -10, "split_begin and split_count must lie within batch (or sequences) * kv_heads") \
    X(NF_E_ALIGN, -11, "workspace, projection and state must be aligned to NF_ALIGN, tensors to their elements") \
    X(NF_E_WORKSPACE, -12, "the workspace is smaller than the workspace function asks for") \
    X(NF_E_OVERLAP, -13, \
      "memory to be written overlaps other memory of the call, or its extent (tensors may, if apart modulo a stride)") \
    X(NF_E_PROJECTION, -14, "this is not a projection of this contract, or it was never initialised") \
    X(NF_E_STATE, -15, \
      "this state is of another contract, projection, scale, eps, decay, pattern or number of units, or was never " \
      "reset; exact and a backward take none, hybrid merges none") \
    X(NF_E_PATTERN, -16, \
      "the pattern is empty, or has what this call does not take: lists with a state; dilation or blocks in hybrid") \
    X(NF_E_VALUE, -17, \
      "a matrix, sample or far_gain is not finite or too large, tau is not in [0.001, 1], or a flag is unknown or " \
      "not for this call") \
    X(NF_E_UNSUPPORTED, -18, "this processor or device lacks what the variant needs") \
    X(NF_E_WINDOW, -19, "window must be from 0 to 2^40, every dilation from 1 to 2^20") \
    X(NF_E_GLOBALS, -20, "globals must not be negative, global_tokens must rise strictly within the keys") \
    X(NF_E_BLOCKS, -21, \
      "block must be the contract's, offsets rise from 0 to block_count over all queries, blocks rise within the " \
      "keys") \
    X(NF_E_DECAY, -22, "every decay must be finite and not above 0, and decay needs the causal mask and keys") \
    X(NF_E_EPS, -23, \
      "eps must be 0, or from 1e-9 to 1 with an uncalibrated projection: of relu, or of exp with NF_FULL, without a " \
      "state, in a forward") \
    X(NF_E_LAUNCH, -24, "the GPU's runtime refused the launch: ask it for its last error")

typedef enum nf_status {
#define NF_STATUS_ENUM(name, value, text) name = value,
    NF_STATUS_LIST(NF_STATUS_ENUM)
#undef NF_STATUS_ENUM
        NF_STATUS_COUNT = 25
} nf_status;

NF_UNUSED static const char *nf_status_text(nf_status status)
{
    switch (status) {
#define NF_STATUS_CASE(name, value, text) \
    case name: \
        return text;
        NF_STATUS_LIST(NF_STATUS_CASE)
#undef NF_STATUS_CASE
    case NF_STATUS_COUNT:
        break;
    }
    return "not a status of nearfar";
}

/* Which keys a query sees. Causal: the last query sees the last key, each earlier one a key less. */
typedef enum nf_mask { NF_CAUSAL = 0, NF_FULL = 1 } nf_mask;

/* A tensor [batch, token, head, dim]; strides in elements, of one entry: any, the last dim's 1.
 * 0 = dense: dim, heads * dim, tokens * token_stride. */
typedef struct nf_input {
    const void *data;
    int64_t batch_stride, token_stride, head_stride;
} nf_input;

typedef struct nf_output {
    void *data;
    int64_t batch_stride, token_stride, head_stride;
} nf_output;

/* The arguments of every call; sizes are counts. */
typedef struct nf_args {
    int64_t batch;     /* at least 1 */
    int64_t heads;     /* query heads, at least 1 */
    int64_t kv_heads;  /* key and value heads, a divisor of heads; 0 = heads */
    int64_t q_tokens;  /* queries per sequence; packed: all tokens together */
    int64_t kv_tokens; /* keys per sequence; 0 = q_tokens, with NF_NO_KEYS none */
    nf_input q, k, v;
    nf_output out;            /* overlaps no other memory of the call */
    float *lse;               /* [batch, heads, q_tokens] natural log of the kernel sum (linear: the sum), or NULL */
    float scale;              /* of the logits; 0 = 1/sqrt(D) (linear: see its manual) */
    int32_t mask;             /* nf_mask */
    const int32_t *cu_tokens; /* packed sequences: their sequences + 1 borders, or NULL */
    int64_t sequences;        /* number of packed sequences */
    const void *projection;   /* of operators with random features */
    size_t projection_stride; /* bytes from one kv head's projection to the next; 0 = one for all heads */
    const struct nf_pattern *pattern; /* of operators over a pattern; the others see every key */
    void *state;                      /* carried in and out, or NULL */
    int64_t split_begin; /* first unit of this call; a unit is one kv head of one batch entry or sequence */
    int64_t split_count; /* units of this call; 0 = all from split_begin on */
    void *stream;        /* GPU stream; ignored on a CPU */
    const float *decay;  /* linear, causal: [kv_heads] natural log of what a token's distance of 1 leaves of its
                            weight, at most 0; NULL: 0 for all */
    uint32_t flags;      /* NF_UNNORMALISED, NF_NO_KEYS */
    float eps;           /* added to features: of favor_relu, 0 = 1e-3; of favor_exp, 0 = not; others take 0 */
} nf_args;

#define NF_UNNORMALISED 1u /* linear: out_i = sum_j A_ij v_j, not divided by sum_j A_ij */
/* Queries alone, in a forward or decode of favor and linear: kv_tokens is 0, k and v are not read, and every query
 * sees all that the state holds, which is only read. With keys NF_E_TOKENS, without a state NF_E_NULL, with decay
 * NF_E_DECAY, of other operators and in a backward NF_E_VALUE. */
#define NF_NO_KEYS 2u

/* What a backward takes and gives, tensors and lse as in nf_args. Of dq, dk and dv everything is written, nothing
 * added to. */
typedef struct nf_grads {
    nf_input out, dout; /* the forward's output, and the loss's gradient by it */
    const float *lse;   /* the forward's lse */
    const float *dlse;  /* the loss's gradient by lse, or NULL: 0 */
    nf_output dq, dk, dv;
} nf_grads;

/* How a projection is made; zero fields are defaults. A sample of one head's queries and keys (rows of D floats; NULL
 * and 0 tokens: none) fits it to the head: the means are taken out (exact: softmax does not see them), the channels of
 * q and k are balanced by Psi, and the logits tempered by tau^2, which trades bias for variance. */
typedef struct nf_calibration {
    const float *q, *k;         /* finite, up to 1e15 */
    int64_t q_tokens, k_tokens; /* rows of each sample */
    int64_t q_stride, k_stride; /* elements from row to row; 0 = D */
    float tau;                  /* [0.001, 1]; 0 = 0.7 with a sample, otherwise 1, no tempering */
    uint32_t flags;             /* NF_KEEP_MEAN .. NF_SIMPLEX */
} nf_calibration;

#define NF_KEEP_MEAN 1u     /* calibration: do not centre q and k */
#define NF_KEEP_CHANNELS 2u /* calibration: do not balance the channels */
#define NF_CHI_NORMS 4u     /* sampling: norms as of normal vectors, no bias; 0: all sqrt(D), less variance */
#define NF_GRAM_SCHMIDT 8u  /* sampling: uniform rotations by Gram-Schmidt; 0: by signs and Hadamard transforms */
#define NF_SIMPLEX 16u      /* sampling: each D rows form a simplex; 0: they are orthogonal */
#define NF_KEEP_F32 1u      /* projection_from: do not round the matrix to bf16 */

/* A projection of one contract: this head, the matrix, the calibration. */
typedef struct nf_projection_head {
    uint32_t magic, abi;
    uint64_t contract; /* hash of the contract's name */
    uint64_t hash;     /* of everything that shapes the features */
    uint32_t calibrated;
    uint32_t reserved[9];
} nf_projection_head;

/* A state: one nf_state_head, then for every batch entry (or sequence) and kv head an nf_state_unit followed by what
 * the operator carries. Far field, float R[M], z[M], S[M][V]: feature r holds z = sum_j 2^(l_jr - R) and S = sum_j
 * 2^(l_jr - R) v_j over the keys j seen so far, l the base-2 exponent of the key's feature and R a whole number (-1e30
 * while no key was seen; linear: 0, but for softmaxqk), all of it fading with the decay up to the last key; of trig and
 * relu 2^(l_j - R) f_jr, f the feature and l_j, R the same for all features (relu: 0). Near field, float K[rows][D],
 * V[rows][D], rows = globals + ring: the first tokens, then the token at position p in row globals + p % ring. */
typedef struct nf_state_head {
    uint32_t magic, abi;
    uint64_t contract;
    int64_t units, unit_bytes;
    int64_t globals, ring; /* rows of the near field */
    uint32_t reserved[4];
} nf_state_head;

typedef struct nf_state_unit {
    uint64_t hash;  /* of projection, scale, eps, decay and pattern */
    int64_t tokens; /* tokens seen so far */
    float decay;    /* of linear */
    float mass;     /* trig: sum_j 2^(l_j - R), l_j the exponent that all features of key j share */
    uint32_t reserved[10];
} nf_state_unit;

typedef nf_status nf_forward_fn(const nf_args *args, void *workspace, size_t bytes);
typedef nf_status nf_backward_fn(const nf_args *args, const nf_grads *grads, void *workspace, size_t bytes);

/* One way to run a kernel; NF_E_UNSUPPORTED where supported() is 0. */
typedef struct nf_variant {
    const char *name;   /* also the symbol's stem: <name>_forward, _decode, _backward */
    const char *target; /* instruction set */
    nf_forward_fn *forward, *decode;
    nf_backward_fn *backward;
    int (*supported)(void);
} nf_variant;

#ifdef __cplusplus
}
#endif
#endif /* NF_CORE_ABI */
