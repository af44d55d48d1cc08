// A machine of its own that lets an emulator's processor walk nested tables: it runs a guest on them with SVM, one
// instruction for each access that it is asked for, and tells what came of it. Source: AMD APM volume 2, "Secure Virtual
// Machine"; Multiboot specification 0.6.96.
//
// In memory when it starts:
//   0x2000000: number of accesses, nCR3, guest address of the code page; then of each: kind * 16, guest address
//   the tables, where nCR3 says
// It writes to port 0xe9: of each access exit code, EXITINFO1, EXITINFO2, EAX, 8 bytes each. Then it ends the emulator.

        .set JOBS, 0x2000000
        .set VMCB, 0x200000
        .set HOST_SAVE, 0x201000
        .set TABLES, 0x202000
        .set STACK, 0x210000

        .code32
        .section .text
        .align 4
header:
        .long 0x1badb002
        .long 0x00010000
        .long 0xe4514ffe
        .long header
        .long 0x100000
        .long 0
        .long 0
        .long start

        .global start
start:
        cli
        movl $STACK, %esp
        // One gigabyte one to one, in large pages.
        movl $TABLES, %edi
        xorl %eax, %eax
        movl $3072, %ecx
        rep stosl
        movl $(TABLES + 0x1003), TABLES
        movl $(TABLES + 0x2003), TABLES + 0x1000
        xorl %ecx, %ecx
1:      movl %ecx, %eax
        shll $21, %eax
        orl $0x83, %eax
        movl %eax, TABLES + 0x2000(, %ecx, 8)
        incl %ecx
        cmpl $512, %ecx
        jne 1b
        movl $0x20, %eax
        movl %eax, %cr4
        movl $TABLES, %eax
        movl %eax, %cr3
        // LME, NXE, SVME
        movl $0xc0000080, %ecx
        xorl %edx, %edx
        movl $0x1900, %eax
        wrmsr
        movl $0x80000011, %eax
        movl %eax, %cr0
        lgdt gdtr
        ljmp $8, $long

        .code64
long:
        movl $16, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $0xc0010117, %ecx
        xorl %edx, %edx
        movl $HOST_SAVE, %eax
        wrmsr
        movq $JOBS, %r12
        movq (%r12), %r13
        movq 8(%r12), %r14
        movq 16(%r12), %r15
        addq $24, %r12
next:
        testq %r13, %r13
        jz done
        movq $VMCB, %rdi
        xorl %eax, %eax
        movl $512, %ecx
        rep stosq
        movq $VMCB, %rbp
        movl $0x81000000, 0x0c(%rbp)
        movl $1, 0x10(%rbp)
        movl $1, 0x58(%rbp)
        movb $1, 0x5c(%rbp)
        movq $1, 0x90(%rbp)
        movq %r14, 0xb0(%rbp)
        // Flat segments of 32 bits; paging off.
        movq $0x400, %rdx
segment:
        movw $16, (%rbp, %rdx)
        movw $0xc93, 2(%rbp, %rdx)
        movl $0xffffffff, 4(%rbp, %rdx)
        addq $16, %rdx
        cmpq $0x460, %rdx
        jne segment
        movw $8, 0x410(%rbp)
        movw $0xc9b, 0x412(%rbp)
        movw $0x82, 0x472(%rbp)
        movw $0x8b, 0x492(%rbp)
        movq $0x1000, 0x4d0(%rbp)
        movq $0x11, 0x558(%rbp)
        movq $2, 0x570(%rbp)
        movabsq $0x0007040600070406, %rax
        movq %rax, 0x668(%rbp)
        movq (%r12), %rax
        addq %r15, %rax
        movq %rax, 0x578(%rbp)
        movq $0xf4, 0x5f8(%rbp)
        movq 8(%r12), %rbx
        movq %rbp, %rax
        clgi
        vmrun
        stgi
        movq 0x70(%rbp), %rax
        call tell
        movq 0x78(%rbp), %rax
        call tell
        movq 0x80(%rbp), %rax
        call tell
        movq 0x5f8(%rbp), %rax
        call tell
        addq $16, %r12
        decq %r13
        jmp next

tell:
        movl $8, %ecx
1:      outb %al, $0xe9
        shrq $8, %rax
        decl %ecx
        jnz 1b
        ret

done:
        // The tables, as they are now: 4 MiB from 16 MiB on.
        movq $0x1000000, %rsi
        movl $0x400000, %ecx
1:      lodsb
        outb %al, $0xe9
        decl %ecx
        jnz 1b
        xorl %eax, %eax
        outb %al, $0xf4
        hlt

        .align 8
gdt:
        .quad 0
        .quad 0x00af9b000000ffff
        .quad 0x00cf93000000ffff
gdtr:
        .word gdtr - gdt - 1
        .long gdt
