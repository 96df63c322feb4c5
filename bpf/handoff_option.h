/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * How a waypoint on another node learns what a connection is for: a TCP option in the SYN, which the node's
 * programs seal with the mesh's key and the waypoint's node opens. It goes where the note of this node would:
 * into `handoffs` there, when the connection is established.
 *
 * 16 bytes are left in a SYN, and the claim needs them all: nothing in it says that it is genuine. So it is
 * enciphered as one block, bound to the connection: four rounds of a Feistel network, whose function is
 * SipHash-2-4 of the round, the connection's ends, the SYN's sequence number and half of the block. What was
 * made without the key, or for another connection, opens to a random claim: of no service that the waypoint
 * has.
 */
#pragma once

#include "sockops.h"
#include "waypoint.h"

#define OPTION_KIND 253 /* RFC 4727 */
#define ROUNDS	    4
#define TCPHDR_SYN  2

struct handoff_claim {
	__u32 service;
	__be16 port;
	__u8 namespace_id[5];
	__u8 account_id[5];
};

union handoff_block {
	struct handoff_claim claim;
	__u64 half[2];
};

/* What the round function is of; no padding. */
struct round_input {
	struct handoff_key ends;
	__u64 half;
	__u32 sequence;
	__be16 prefix;
	__u16 round;
};

_Static_assert(sizeof(struct handoff_claim) == 16, "handoff_claim");
_Static_assert(sizeof(struct round_input) == 56, "round_input");

static __always_inline __u64 rotate(__u64 word, __u32 bits)
{
	return word << bits | word >> (64 - bits);
}

#define SIPHASH_ROUND(v)                                                                                     \
	({                                                                                                   \
		v[0] += v[1];                                                                                \
		v[1] = rotate(v[1], 13) ^ v[0];                                                              \
		v[0] = rotate(v[0], 32);                                                                     \
		v[2] += v[3];                                                                                \
		v[3] = rotate(v[3], 16) ^ v[2];                                                              \
		v[0] += v[3];                                                                                \
		v[3] = rotate(v[3], 21) ^ v[0];                                                              \
		v[2] += v[1];                                                                                \
		v[1] = rotate(v[1], 17) ^ v[2];                                                              \
		v[2] = rotate(v[2], 32);                                                                     \
	})

/* SipHash-2-4 (Aumasson, Bernstein 2012). */
verified_once __u64 siphash(const struct round_input *input, const struct handoff_secret *secret)
{
	__u64 v[4], word;
	__u32 i;

	if (!input || !secret)
		return 0;
	v[0] = secret->key[0] ^ 0x736f6d6570736575ULL;
	v[1] = secret->key[1] ^ 0x646f72616e646f6dULL;
	v[2] = secret->key[0] ^ 0x6c7967656e657261ULL;
	v[3] = secret->key[1] ^ 0x7465646279746573ULL;
#pragma unroll
	for (i = 0; i <= sizeof(*input) / 8; i++) {
		word = i < sizeof(*input) / 8 ? ((const __u64 *)input)[i] : (__u64)sizeof(*input) << 56;
		v[3] ^= word;
		SIPHASH_ROUND(v);
		SIPHASH_ROUND(v);
		v[0] ^= word;
	}
	v[2] ^= 0xff;
	SIPHASH_ROUND(v);
	SIPHASH_ROUND(v);
	SIPHASH_ROUND(v);
	SIPHASH_ROUND(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* Seals a block, or opens a sealed one: the same rounds in the other order, with its halves changed over. */
static __always_inline void encipher(union handoff_block *block, struct round_input *input,
				     const struct handoff_secret *secret, bool is_sealed)
{
	__u64 left = block->half[is_sealed], right = block->half[!is_sealed], next;
	int i;

#pragma unroll
	for (i = 0; i < ROUNDS; i++) {
		input->round = is_sealed ? ROUNDS - 1 - i : i;
		input->half = right;
		next = left ^ siphash(input, secret);
		left = right;
		right = next;
	}
	block->half[is_sealed] = left;
	block->half[!is_sealed] = right;
}

/* The mesh's key, on the stack; false: this node has none. */
static __always_inline bool read_secret(struct handoff_secret *secret)
{
	__u32 zero = 0;
	struct handoff_secret *found = bpf_map_lookup_elem(&handoff_secrets, &zero);

	if (!found || !found->is_set)
		return false;
	__builtin_memcpy(secret, found, sizeof(*secret));
	return true;
}

/* Whether a waypoint's instances are behind this address on this node. */
static __always_inline bool is_front_here(const struct handoff_key *ends)
{
	struct front_key key = { .address = ends->waypoint, .port = bpf_ntohs(ends->waypoint_port) };

	return bpf_map_lookup_elem(&fronts, &key);
}

/*
 * Before the SYN leaves: what `claim_written` puts into it, also when it is sent again. False: without a key
 * there is no claim.
 */
static __always_inline bool make_claim(struct bpf_sock_ops *ops, struct bpf_sock *sk,
				       const struct handoff_key *ends, const struct handoff_value *asked)
{
	struct round_input input = { .ends = *ends, .sequence = asked->sequence, .prefix = asked->prefix };
	union handoff_block block;
	struct handoff_secret secret;
	struct handoff_option *option;

	if (!read_secret(&secret))
		return false;
	block.claim.service = asked->service;
	block.claim.port = asked->port;
	__builtin_memcpy(block.claim.namespace_id, asked->client_namespace, sizeof(block.claim.namespace_id));
	__builtin_memcpy(block.claim.account_id, asked->client_account, sizeof(block.claim.account_id));
	encipher(&block, &input, &secret, false);
	option = bpf_sk_storage_get(&claims, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!option) {
		count(REASON_STATE_LOST);
		return true;
	}
	option->kind = OPTION_KIND;
	option->length = sizeof(*option);
	option->prefix = asked->prefix;
	__builtin_memcpy(option->sealed, &block, sizeof(option->sealed));
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	return true;
}

static __always_inline struct handoff_option *claim_of(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;

	return sk ? bpf_sk_storage_get(&claims, sk, 0, 0) : NULL;
}

static __always_inline void claim_reserved(struct bpf_sock_ops *ops)
{
	if (!(ops->skb_tcp_flags & TCPHDR_SYN) || !claim_of(ops))
		return;
	/* A socket with options that leave no room: the waypoint hears of nothing, and closes. */
	if (bpf_reserve_hdr_opt(ops, sizeof(struct handoff_option), 0))
		count(REASON_STATE_LOST);
}

static __always_inline void claim_written(struct bpf_sock_ops *ops)
{
	struct handoff_option *found, option;

	if (!(ops->skb_tcp_flags & TCPHDR_SYN))
		return;
	found = claim_of(ops);
	if (!found)
		return;
	__builtin_memcpy(&option, found, sizeof(option));
	bpf_store_hdr_opt(ops, &option, sizeof(option), 0);
}

static __always_inline void drop_claim(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;

	if (!(ops->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG) || !sk)
		return;
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	bpf_sk_storage_delete(&claims, sk);
}

static __always_inline bool load_claim(struct bpf_sock_ops *ops, struct handoff_option *option, __u16 prefix)
{
	__builtin_memset(option, 0, sizeof(*option));
	option->kind = OPTION_KIND;
	option->length = 4; /* of what is looked for: kind, length and the magic */
	option->prefix = bpf_htons(prefix);
	return bpf_load_hdr_opt(ops, option, sizeof(*option), BPF_LOAD_HDR_OPT_TCP_SYN) == sizeof(*option);
}

/* Of a waypoint's cgroup. A SYN is there to be read where the listening socket keeps it (TCP_SAVE_SYN). */
SEC("sockops")
int pykmesh_arrived(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct handoff_option option;
	struct handoff_secret secret;
	struct handoff_value asked = {};
	struct round_input input = {};
	union handoff_block block;

	if (ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB || !sk || !read_secret(&secret))
		return 1;
	if (!load_claim(ops, &option, HANDOFF_IPV4) && !load_claim(ops, &option, HANDOFF_IPV6))
		return 1;
	input.ends.client = sockops_remote(ops);
	input.ends.waypoint = sockops_local(ops);
	input.ends.client_port = sockops_remote_port(ops);
	input.ends.waypoint_port = bpf_htons(ops->local_port);
	input.sequence = ops->rcv_nxt - 1;
	input.prefix = option.prefix;
	__builtin_memcpy(&block, option.sealed, sizeof(block));
	encipher(&block, &input, &secret, true);
	asked.prefix = option.prefix;
	asked.sequence = input.sequence;
	asked.port = block.claim.port;
	asked.service = block.claim.service;
	__builtin_memcpy(asked.client_namespace, block.claim.namespace_id, sizeof(asked.client_namespace));
	__builtin_memcpy(asked.client_account, block.claim.account_id, sizeof(asked.client_account));
	note_handoff(&input.ends, &asked);
	return 1;
}
